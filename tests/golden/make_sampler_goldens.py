"""Makes samplers.json: what llama.cpp's samplers leave of random logits, to hold `airjax.sampling` to.

    pip install llama-cpp-python
    python tests/golden/make_sampler_goldens.py SMOLLM2.gguf

Each case has a sampler's settings, the tokens that were drawn before, and the candidates that are left in the order of
falling probability, with their probabilities. The model's file is needed for its vocabulary alone (DRY wants one).
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

HERE = Path(__file__).parent
V = 60
ROWS = 3
HISTORY = [3, 7, 1, 3, 7, 5, 9, 3, 7, 1, 4, 3, 7]


def logits() -> np.ndarray:
    """Rows of a flat, a usual and a sharp distribution; rounded, so that they are the same everywhere."""
    generator = np.random.default_rng(7)
    spread = np.array([[0.7], [2.0], [6.0]])
    return np.round(generator.normal(size=(ROWS, V)) * spread, 3)


def cases() -> list[dict[str, Any]]:
    """Name of the sampler, its settings by our names, and the arguments of llama.cpp's function."""
    made = []

    def add(name: str, settings: dict[str, Any], *arguments: Any) -> None:
        made.append({"sampler": name, "settings": settings, "arguments": arguments})

    for t in (0.3, 1.7, 0.0):
        add("temp", {"temperature": t}, t)
    for t, spread, exponent in ((1.0, 0.5, 1.0), (0.8, 0.8, 2.0), (1.2, 2.0, 0.5), (0.7, 0.0, 1.0)):
        settings = {"temperature": t, "dynatemp_range": spread, "dynatemp_exponent": exponent}
        add("temp_ext", settings, t, spread, exponent)
    for k in (1, 5, 59, 100):
        add("top_k", {"top_k": k}, k)
    for p in (0.0, 0.2, 0.9, 0.999):
        add("top_p", {"top_p": p}, p, 1)
        add("typical", {"typical_p": p}, p, 1)
    for p in (0.02, 0.3, 1.0):
        add("min_p", {"min_p": p}, p, 1)
    for n in (-1.0, 0.5, 1.0, 3.0):
        add("top_n_sigma", {"top_n_sigma": n}, n)
    for threshold in (0.01, 0.05, 0.2, 0.6):
        add("xtc", {"xtc_probability": 1.0, "xtc_threshold": threshold}, 1.0, threshold, 1, 0)
    for last_n, repeat, frequency, presence in (
        (64, 1.3, 0.0, 0.0),
        (5, 1.1, 0.4, 0.7),
        (-1, 0.8, -0.5, 0.1),
    ):
        settings = {"repeat_last_n": last_n, "repeat_penalty": repeat}
        settings |= {"frequency_penalty": frequency, "presence_penalty": presence}
        size = len(HISTORY) if last_n < 0 else last_n
        add("penalties", settings, V, size, repeat, frequency, presence)
    for multiplier, base, allowed, last_n in (
        (0.8, 1.75, 2, -1),
        (1.5, 1.2, 1, -1),
        (0.8, 1.75, 2, 7),
        (0.5, 3.0, 4, 9),
    ):
        settings = {"dry_multiplier": multiplier, "dry_base": base, "dry_allowed_length": allowed}
        size = len(HISTORY) if last_n < 0 else last_n
        add("dry", settings | {"dry_penalty_last_n": last_n}, multiplier, base, allowed, size, None, 0)
    add("logit_bias", {"logit_bias": {"3": 2.5, "10": -4.0, "11": "-inf"}})
    for tau, eta in ((3.0, 0.1), (1.0, 0.5)):
        add("mirostat", {"mirostat": 1, "mirostat_tau": tau, "mirostat_eta": eta}, V, 1, tau, eta, 100)
        add("mirostat_v2", {"mirostat": 2, "mirostat_tau": tau, "mirostat_eta": eta}, 1, tau, eta)
    for target, decay in ((0.3, 0.9), (0.05, 0.5), (0.9, 0.0)):
        add("adaptive_p", {"adaptive_p_target": target, "adaptive_p_decay": decay}, target, decay, 1)
    return made


def make(case: dict[str, Any], vocab: object) -> object:
    """llama.cpp's sampler of a case."""
    name, arguments = case["sampler"], case["arguments"]
    if name == "dry":
        arguments = (vocab, *arguments)
    if name == "logit_bias":
        biases = case["settings"]["logit_bias"]
        array = (llama_cpp.llama_logit_bias * len(biases))(
            *(llama_cpp.llama_logit_bias(int(token), float(bias)) for token, bias in biases.items())
        )
        arguments = (V, len(biases), array)
    sampler = getattr(llama_cpp, f"llama_sampler_init_{name}")(*arguments)
    for token in HISTORY:
        if name in ("penalties", "dry"):
            llama_cpp.llama_sampler_accept(sampler, token)
    return sampler


def apply(sampler: object, row: np.ndarray) -> tuple[list[int], list[float], int]:
    """The candidates that are left by falling logit, their probabilities, and the one selected, -1 if none."""
    data = (llama_cpp.llama_token_data * V)(
        *(llama_cpp.llama_token_data(token, float(logit), 0.0) for token, logit in enumerate(row))
    )
    array = llama_cpp.llama_token_data_array(data, V, -1, False)
    llama_cpp.llama_sampler_apply(sampler, ctypes.byref(array))
    left = [(array.data[i].id, array.data[i].logit) for i in range(array.size)]
    selected = left[array.selected][0] if array.selected >= 0 else -1
    left = sorted((pair for pair in left if pair[1] > -np.inf), key=lambda pair: (-pair[1], pair[0]))
    weights = np.exp(np.array([logit for _, logit in left]) - left[0][1])
    return [token for token, _ in left], (weights / weights.sum()).tolist(), selected


def main(path: str) -> None:
    """Writes the file."""
    llama_cpp.llama_backend_init()
    options = llama_cpp.llama_model_default_params()
    options.vocab_only = True
    model = llama_cpp.llama_load_model_from_file(path.encode(), options)
    vocab = llama_cpp.llama_model_get_vocab(model)
    rows = logits()
    results = []
    for case in cases():
        # A stateful sampler sees one row after another; for the others each row is on its own.
        steps = []
        sampler = make(case, vocab)
        for row in rows:
            ids, probs, selected = apply(sampler, row)
            steps.append({"ids": ids, "probs": [round(p, 8) for p in probs], "selected": selected})
            if case["sampler"] == "adaptive_p":
                llama_cpp.llama_sampler_accept(sampler, selected)
        llama_cpp.llama_sampler_free(sampler)
        results.append({"sampler": case["sampler"], "settings": case["settings"], "steps": steps})
    written = {
        "llama_cpp_python": llama_cpp.__version__,
        "history": HISTORY,
        "logits": rows.tolist(),
        "cases": results,
    }
    (HERE / "samplers.json").write_text(json.dumps(written) + "\n", encoding="utf-8")
    print(len(results), "cases")


if __name__ == "__main__":
    main(sys.argv[1])
