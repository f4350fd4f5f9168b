"""The architectures that share one block, against transformers, on random models with every option turned on."""

import gguf
import numpy as np
import pytest
from divergence import max_kl
from other_ways import bare_logits, logits_in_pieces, stepwise_logits
from torch_dense import torch_logits
from toy_models import DECODERS, toy_decoder

import airjax
from airjax.engine.sessionfile import SessionError
from airjax.gguf import GGUFError

_EVERY = pytest.mark.parametrize("architecture", sorted(DECODERS))
# These are others of them but for names and numbers in their files.
_ALIKE = {
    "baichuan",
    "chatglm",
    "codeshell",
    "exaone",
    "gemma",
    "hunyuan-dense",
    "internlm2",
    "minicpm",
    "qwen",
}
_ALIKE |= {"starcoder", "xverse", "ernie4_5", "mpt", "orion", "plamo", "refact", "jais", "jais2"}
_ALIKE |= {"pangu-embedded", "qwen2vl", "qwen3vl"}
_DISTINCT = pytest.mark.parametrize("architecture", sorted(set(DECODERS) - _ALIKE))


def _load(path, **options):
    return airjax.load(path, vram_budget_gib=1, context=128, compute_dtype="float32", **options)


def _ids(model, count):
    return np.random.default_rng(0).integers(0, model.config.vocab_size, count).tolist()


@pytest.mark.parametrize(
    ("architecture", "separate_output"),
    [(name, own) for name in sorted(DECODERS) for own in (False, True) if own or name not in _ALIKE],
)
def test_a_random_model_gives_the_logits_of_transformers(tmp_path, architecture, separate_output):
    path = toy_decoder(tmp_path / "toy.gguf", architecture, separate_output=separate_output)
    with _load(path) as loaded:
        ids = _ids(loaded.model, 100)
        assert max_kl(torch_logits(path, ids), loaded.logits(ids)) < 1e-6


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_yarn_gives_the_logits_of_transformers(tmp_path, architecture):
    plain, path = (
        toy_decoder(tmp_path / f"{factor}.gguf", architecture, yarn_factor=factor) for factor in (0.0, 4.0)
    )
    with _load(path) as loaded:
        ids = _ids(loaded.model, 100)
        theirs = torch_logits(path, ids)
        assert max_kl(theirs, loaded.logits(ids)) < 1e-6
    assert max_kl(torch_logits(plain, ids), theirs) > 1e-3


def test_longrope_takes_the_divisors_of_the_context_as_transformers_does(tmp_path):
    path = toy_decoder(tmp_path / "toy.gguf", "phi3", longrope=True)
    with _load(path) as loaded:
        ids = _ids(loaded.model, 100)
        assert max_kl(torch_logits(path, ids), loaded.logits(ids)) < 1e-6
        # A short text in a long context keeps the divisors of the context.
        assert max_kl(torch_logits(path, ids[:60]), loaded.logits(ids[:60])) > 1e-6
        loaded.save(loaded.session(ids[:40]), str(tmp_path / "long.session"))
    with airjax.load(path, vram_budget_gib=1, context=64, compute_dtype="float32") as loaded:
        assert max_kl(torch_logits(path, ids[:60]), loaded.logits(ids[:60])) < 1e-6
        with pytest.raises(SessionError, match="keys were turned for a long context"):
            loaded.restore(str(tmp_path / "long.session"))


@_DISTINCT
def test_token_by_token_and_in_pieces_equals_the_full_forward(tmp_path, architecture):
    with _load(toy_decoder(tmp_path / "toy.gguf", architecture)) as loaded:
        ids = _ids(loaded.model, 24)
        whole = loaded.logits(ids)
        assert max_kl(whole, stepwise_logits(loaded, ids, prompt=8)) < 1e-5
        np.testing.assert_allclose(logits_in_pieces(loaded, ids, cuts=(1, 2, 17)), whole, atol=1e-4)


@_DISTINCT
def test_streamed_with_the_shuttle_equals_resident(tmp_path, architecture):
    path = toy_decoder(tmp_path / "toy.gguf", architecture, block_type="Q4_0")
    with _load(path, resident="all") as loaded:
        ids = _ids(loaded.model, 40)
        expected = loaded.logits(ids)
    with _load(path, resident="none", stream_depth=2, kv_shuttle="on") as loaded:
        np.testing.assert_array_equal(loaded.logits(ids), expected)


@_DISTINCT
def test_the_bare_functions_give_the_logits_of_the_engine(tmp_path, architecture):
    path = toy_decoder(tmp_path / "toy.gguf", architecture)
    with _load(path) as loaded:
        ids = _ids(loaded.model, 20)
        np.testing.assert_allclose(bare_logits(path, ids), loaded.logits(ids), atol=1e-4)


@_EVERY
def test_a_file_without_one_of_its_tensors_is_refused_by_name(tmp_path, architecture, monkeypatch):
    add = gguf.GGUFWriter.add_tensor
    left_out = "blk.1.attn_output.weight"

    def all_but_one(self, name, *args, **options):
        if name != left_out:
            add(self, name, *args, **options)

    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", all_but_one)
    path = toy_decoder(tmp_path / "toy.gguf", architecture)
    name = DECODERS[architecture].get("architecture", architecture)
    with pytest.raises(GGUFError, match=f"tensor {left_out} is missing: a {name} model"):
        _load(path)


@pytest.mark.parametrize("tier", ["ring", "pageable mapping"])
def test_numbers_of_the_metadata_are_streamed_with_their_layers(tmp_path, tier):
    path = toy_decoder(tmp_path / "toy.gguf", "apertus", layers=4)
    with _load(path, resident="all") as loaded:
        ids = _ids(loaded.model, 40)
        expected = loaded.logits(ids)
    with _load(path, resident="none", stream_depth=2, tier=tier) as loaded:
        np.testing.assert_array_equal(loaded.logits(ids), expected)


@pytest.mark.parametrize(
    "numbers", [None, [0.5] * 3, [0.5, 0.5, float("nan"), 0.5], [1, 1, 1, 1], 0.5], ids=str
)
def test_an_activation_without_a_number_for_each_layer_is_refused_by_name(tmp_path, monkeypatch, numbers):
    options = DECODERS["apertus"]
    keys = {**options["keys"], "xielu.beta": numbers}
    monkeypatch.setitem(
        DECODERS,
        "apertus",
        options | {"keys": {key: value for key, value in keys.items() if value is not None}},
    )
    with pytest.raises(
        GGUFError, match=r"xielu\.beta must be an array with a finite float32 number for each of 4"
    ):
        _load(toy_decoder(tmp_path / "toy.gguf", "apertus"))


@pytest.mark.parametrize(
    ("architecture", "values", "message"),
    [
        ("qwen2", {"rope.scaling.type": "longrope"}, "rope.scaling.type 'longrope' can't be run"),
        ("qwen2", {"rope.dimension_sections": [8, 4, 4, 0]}, "a rope in sections"),
        ("qwen3", {"rope.dimension_count": 7}, "rope.dimension_count must be even"),
        ("granite", {"logit_scale": 0.0}, "granite.logit_scale divides the logits"),
        ("gemma2", {"attention.sliding_window": 0}, "sliding_window must be at least 1"),
        ("olmo3", {"attention.sliding_window_pattern": [True, False, True, False]}, "each 4th layer see"),
        ("command-r", {"logit_scale": 0.0}, "command-r.logit_scale is a factor"),
        ("cohere2", {"logit_scale": 0.0}, "cohere2.logit_scale is a factor"),
        ("cohere2", {"attention.sliding_window": 0}, "cohere2.attention.sliding_window is missing"),
        ("phi3", {"rope.scaling.type": "longrope"}, "and longrope with its factors"),
        ("mistral3", {"expert_count": 4}, "a mistral3 model with experts"),
        ("mistral3", {"attention.temperature_length": 0}, "temperature_length must be at least 1"),
        ("falcon", {"attention.layer_norm_epsilon": 2.0}, "layer_norm_epsilon must be in"),
        ("deci", {"attention.head_count_kv": [2, 4, 0, 1, 1]}, "layer 3 of a deci model must have 4 heads"),
        ("deci", {"feed_forward_length": [128, 64, 96, 0, 0]}, "layer 3 has neither attention nor"),
        (
            "openelm",
            {"attention.head_count_kv": [1, 2, 4, 4]},
            "layer 2 of an openelm model must have a number",
        ),
        ("openelm", {"feed_forward_length": [64, 0, 128, 160]}, "layer 1 of an openelm model must have"),
        ("deci", {"attention.head_count": [4, 4]}, "must be a whole number for each of 5 layers"),
    ],
)
def test_what_can_t_be_run_is_refused_by_name(tmp_path, monkeypatch, architecture, values, message):
    options = DECODERS[architecture]
    monkeypatch.setitem(DECODERS, architecture, options | {"values": options.get("values", {}) | values})
    with pytest.raises(GGUFError, match=message):
        _load(toy_decoder(tmp_path / "toy.gguf", architecture))
