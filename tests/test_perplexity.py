"""Perplexity and greedy text beside llama.cpp's, on the real models."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

import airjax
from airjax.commands.perplexity import cut_windows, score

_HERE = Path(__file__).parent
_GOLDEN = json.loads((_HERE / "golden" / "llama_cpp.json").read_text())


@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_perplexity_is_that_of_llama_cpp(name, request):
    golden = _GOLDEN[name]
    with airjax.load(request.getfixturevalue(name), vram_budget_gib=3, context=golden["window"]) as engine:
        tokenizer = engine.tokenizer
        ids = tokenizer.encode((_HERE / "data" / "prose.txt").read_text())
        windows = cut_windows(ids, golden["window"], tokenizer.bos_id if tokenizer.add_bos else None)
        means = [float(score(engine.logits(window), window).mean()) for window in windows]
    assert len(means) == len(golden["mean_nll_of_windows"]) >= 3

    def ratio(of):
        return math.exp(np.mean(means) - np.mean(golden[of]))

    assert ratio("mean_nll_of_windows_with_decoded_weights") == pytest.approx(1, abs=0.001)
    # On the file as it is llama.cpp rounds activations to 8 bits, which costs it 0.4 % and 0.9 % of perplexity here.
    assert 0.985 < ratio("mean_nll_of_windows") < 1.001


@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_greedy_text_begins_as_that_of_llama_cpp(name, request):
    """llama.cpp rounds activations to 8 bits, so a near tie may part the two after some tokens."""
    with airjax.load(request.getfixturevalue(name), vram_budget_gib=3, context=512) as engine:
        same = []
        for case in _GOLDEN[name]["greedy"]:
            ids = engine.tokenizer.encode(case["prompt"])
            drawn = [token.id for token in engine.generate(ids, max_tokens=16, ignore_eos=True)]
            equal = [a == b for a, b in zip(drawn, case["ids"], strict=False)]
            same.append(equal.index(False) if False in equal else len(equal))
    assert min(same) >= 2 and sum(same) >= 24, same
