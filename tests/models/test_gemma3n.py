"""The gemma3n architecture against transformers: streams side by side, products of low rank, few activations.

What it shares with the small Gemma 4 is held by test_per_layer.py.
"""

import pytest
from divergence import max_kl
from toy_experts import random_ids
from toy_gemma3n import torch_gemma3n_logits, toy_gemma3n

import airjax
from airjax.gguf import GGUFError

_OPTIONS = {
    "plain": {},
    "nothing shared": {"shared": 0},
    "nothing sparse": {"sparse": 0},
    "sparse layers that share": {"sparse": 6},
    "two widths": {"wide": True},
    "default pattern": {
        "every": 5,
        "layers": 10,
        "shared": 5,
        "without": ("attention.sliding_window_pattern",),
    },
    "default cap and streams": {"without": ("final_logit_softcapping", "altup.num_inputs")},
    "Q4_0": {"block_type": "Q4_0", "per_layer": 64},
    "Q6_K": {"block_type": "Q6_K", "per_layer": 256},
}


def _load(path, **options):
    return airjax.load(path, vram_budget_gib=1, context=256, compute_dtype="float32", **options)


def _logits(path):
    with _load(path) as loaded:
        return loaded.logits(list(range(260, 300)))


@pytest.mark.parametrize("options", _OPTIONS)
def test_a_random_model_gives_the_logits_of_transformers(tmp_path, options):
    path = toy_gemma3n(tmp_path / "toy.gguf", **_OPTIONS[options])
    with _load(path) as loaded:
        ids = random_ids(loaded.model.config.vocab_size, 70)
        assert max_kl(torch_gemma3n_logits(path, ids), loaded.logits(ids)) < 1e-6


@pytest.mark.parametrize("options", [name for name in _OPTIONS if "default" not in name and name != "plain"])
def test_each_option_changes_the_logits(tmp_path, options):
    """Else the test above would say nothing about it."""
    plain = _logits(toy_gemma3n(tmp_path / "plain.gguf"))
    assert max_kl(plain, _logits(toy_gemma3n(tmp_path / "toy.gguf", **_OPTIONS[options]))) > 1e-3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"altup.active_idx": 1}, "altup.active_idx 0, got 4 and 1"),
        ({"altup.num_inputs": 1}, "altup.num_inputs must be between 2 and 16"),
        ({"altup.num_inputs": 3}, "tensor altup_proj.weight must have shape"),
        ({"embedding_length_per_layer_input": 0}, "are missing: convert the model again"),
        ({"attention.shared_kv_layers": 5.0}, "must leave keys and values to a layer with a window"),
        ({"attention.sliding_window": 0}, "sliding_window must be at least 1"),
        (
            {"attention.sliding_window_pattern": [True, True, False] + [True] * 3},
            "must let each so manyth of 6",
        ),
        ({"attention.sliding_window_pattern": 1}, "must let each so manyth of 6"),
        ({"feed_forward_length": [128] * 5 + [0]}, "feed_forward_length must be at least 1 in each layer"),
        ({"activation_sparsity_scale": [0.5]}, "must be a number for each of 6 layers"),
        ({"activation_sparsity_scale": [0.5, 0.6] + [0.0] * 4}, "the same above 0 for some"),
        ({"activation_sparsity_scale": [float("nan")] * 6}, "the same above 0 for some"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name(tmp_path, values, message):
    with pytest.raises(GGUFError, match=message):
        _load(toy_gemma3n(tmp_path / "toy.gguf", values=values))


def test_a_file_that_does_not_say_what_is_shared_is_refused(tmp_path):
    path = toy_gemma3n(tmp_path / "toy.gguf", without=("attention.shared_kv_layers",))
    with pytest.raises(GGUFError, match="shared_kv_layers are missing: convert the model again"):
        _load(path)
