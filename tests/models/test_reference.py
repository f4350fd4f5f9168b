"""Two references that share no code agree, and the engine with the one that shares none with airjax."""

from pathlib import Path

import numpy as np
import pytest
from divergence import max_kl
from reference import reference_logits
from torch_models import torch_logits
from toy_models import toy_gemma3, toy_llama

import airjax

_PROSE = (Path(__file__).parents[1] / "data" / "prose.txt").read_text()
_WRITERS = {"llama": toy_llama, "gemma3": toy_gemma3}
_COMMON = {"separate_output": True, "linear_factor": 4.0, "head_width": 24}
_TOYS = {
    "llama": ("llama", {}),
    "llama of every option": (
        "llama",
        {**_COMMON, "rope_factors": True, "attention_biases": True, "mlp_biases": True},
    ),
    "llama of K-quants": ("llama", {"block_type": "Q5_K"}),
    "gemma3": ("gemma3", {}),
    "gemma3 of every option": ("gemma3", {**_COMMON, "softcap": 3.0, "layers": 12}),
    "gemma3 of K-quants": ("gemma3", {"block_type": "Q6_K", "kv_heads": 1}),
    "gemma3 with a pattern in the file": ("gemma3", {"pattern": 3}),
    "gemma3 with a local rope base in the file": ("gemma3", {"local_rope_base": 500.0}),
    "gemma3 as deep as the 27B model": ("gemma3", {"layers": 62, "head_width": 32}),
}


@pytest.mark.parametrize("toy", _TOYS)
def test_numpy_torch_and_the_engine_agree_on_a_random_model(tmp_path, toy):
    architecture, options = _TOYS[toy]
    path = _WRITERS[architecture](tmp_path / "toy.gguf", **options)
    with airjax.load(path, vram_budget_gib=1, context=128) as loaded:
        ids = np.random.default_rng(1).integers(0, loaded.model.config.vocab_size, 100).tolist()
        exact = reference_logits(path, ids, np.float64)
        assert exact.dtype == np.float64
        for logits in (reference_logits(path, ids), torch_logits(path, ids), loaded.logits(ids)):
            assert max_kl(exact, logits) < 1e-6


def _against_numpy(path, count):
    with airjax.load(path, vram_budget_gib=3, context=1024) as loaded:
        ids = loaded.tokenizer.encode(_PROSE)[:count]
        assert len(ids) == count
        return max_kl(reference_logits(path, ids), loaded.logits(ids))


def test_smollm2_is_that_of_numpy(smollm2):
    assert _against_numpy(smollm2, 200) < 1e-4


def test_gemma3_is_that_of_numpy_past_its_window(gemma3):
    assert _against_numpy(gemma3, 640) < 1e-4
