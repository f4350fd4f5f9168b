"""Mixtures of experts against transformers, on random models."""

import gguf
import numpy as np
import pytest
from divergence import max_kl
from other_ways import bare_logits, logits_in_pieces, stepwise_logits
from torch_mixtures import torch_mixture_logits
from toy_experts import MIXTURES, random_ids, toy_mixture

import airjax
from airjax import models
from airjax.gguf import GGUFError, build_manifest, describe, format_description, open_gguf

_EVERY = pytest.mark.parametrize("model", sorted(MIXTURES))
# The others differ from one of these in their configuration alone.
_DISTINCT = pytest.mark.parametrize(
    "model",
    ["deepseek2", "deepseek2-lite", "glm4moe", "gpt-oss", "grok-2", "llama4", "mimo2", "qwen2moe"],
)


def _load(path, **options):
    return airjax.load(path, vram_budget_gib=1, context=256, compute_dtype="float32", **options)


@_EVERY
def test_a_random_model_gives_the_logits_of_transformers(tmp_path, model):
    path = toy_mixture(tmp_path / "toy.gguf", model)
    with _load(path) as loaded:
        ids = random_ids(loaded.model.config.vocab_size, 100)
        assert max_kl(torch_mixture_logits(path, ids), loaded.logits(ids)) < 1e-6


@pytest.mark.parametrize("normalized", [True, False])
def test_weights_that_sum_to_one_are_the_files_own_matter(tmp_path, normalized):
    path = toy_mixture(tmp_path / "toy.gguf", "qwen3moe", values={"expert_weights_norm": normalized})
    with _load(path) as loaded:
        ids = random_ids(loaded.model.config.vocab_size, 70)
        assert max_kl(torch_mixture_logits(path, ids), loaded.logits(ids)) < 1e-6


def test_groups_limit_the_choice_as_in_transformers(tmp_path):
    groups = {"expert_group_count": 4, "expert_group_used_count": 2}
    path = toy_mixture(tmp_path / "toy.gguf", "glm4moe", values=groups)
    with _load(path) as loaded:
        ids = random_ids(loaded.model.config.vocab_size, 70)
        theirs = torch_mixture_logits(path, ids)
        assert max_kl(theirs, loaded.logits(ids)) < 1e-6
    with _load(toy_mixture(tmp_path / "free.gguf", "glm4moe")) as loaded:
        assert max_kl(theirs, loaded.logits(ids)) > 1e-3


def test_groups_of_a_softmax_count_as_their_best_expert(tmp_path):
    groups = {"expert_group_count": 4, "expert_group_used_count": 2}
    values = MIXTURES["deepseek2-lite"]["values"] | groups
    path = toy_mixture(tmp_path / "toy.gguf", "deepseek2-lite", values=values)
    with _load(path) as loaded:
        ids = random_ids(loaded.model.config.vocab_size, 70)
        assert max_kl(torch_mixture_logits(path, ids), loaded.logits(ids)) < 1e-6


def test_latent_attention_keeps_one_vector_of_a_token(tmp_path):
    with _load(toy_mixture(tmp_path / "toy.gguf", "deepseek2")) as loaded:
        config = loaded.model.config
        assert (config.n_kv_heads, config.head_dim) == (1, 32 + 8)


def test_latent_attention_goes_without_experts(tmp_path, monkeypatch):
    options = MIXTURES["deepseek2"] | {"dense": (0, 1, 2), "count": 0, "used": 0}
    values = {"leading_dense_block_count": 3, "expert_shared_count": 0}
    monkeypatch.setitem(MIXTURES, "youtu", {**options, "architecture": "deepseek2", "values": values})
    path = toy_mixture(tmp_path / "toy.gguf", "youtu")
    with _load(path) as loaded:
        assert loaded.model.config.experts is None
        ids = random_ids(loaded.model.config.vocab_size, 70)
        assert max_kl(torch_mixture_logits(path, ids), loaded.logits(ids)) < 1e-6


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"attention.kv_lora_rank": 0}, "attention.kv_lora_rank must be a positive number, got 0"),
        ({"rope.dimension_count": 32}, "must be even and less than a key's width 32, got 32"),
        ({"attention.q_lora_rank": 40}, r"attn_q_a.weight must have shape \(40, 64\) by the metadata"),
        ({"rope.scaling.type": "longrope"}, "rope.scaling.type 'longrope' can't be run"),
    ],
)
def test_latent_attention_that_does_not_fit_is_refused_by_name(tmp_path, values, message):
    values = MIXTURES["deepseek2"]["values"] | values
    with pytest.raises(GGUFError, match=message):
        _load(toy_mixture(tmp_path / "toy.gguf", "deepseek2", values=values))


def test_layers_that_guess_further_tokens_are_not_carried(tmp_path):
    with _load(toy_mixture(tmp_path / "toy.gguf", "glm4moe", layers=2)) as loaded:
        assert "blk.2.nextn.eh_proj.weight" in loaded.model.gguf.tensors
        assert loaded.model.config.n_layers == len(loaded.model.manifest.layers) == 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"expert_gating_func": 4}, r"expert_gating_func must be 1 \(softmax\), 2 .* got 4"),
        ({"expert_group_count": 3}, "must cut 8 experts in equal groups"),
        ({"expert_group_count": 8, "expert_group_used_count": 4}, "must leave 2 experts in a group, got 8"),
        ({"leading_dense_block_count": 9}, "leading_dense_block_count must be at most block_count, got 9"),
        ({"leading_dense_block_count": 0}, "tensor blk.0.ffn_gate_inp.weight is missing"),
        ({"nextn_predict_layers": 4}, "nextn_predict_layers must be less than block_count"),
    ],
)
def test_a_mixture_with_dense_layers_that_don_t_fit_is_refused_by_name(tmp_path, values, message):
    with pytest.raises(GGUFError, match=message):
        _load(toy_mixture(tmp_path / "toy.gguf", "glm4moe", values=values))


@pytest.mark.parametrize(
    ("model", "block_type"),
    [
        ("qwen2moe", "Q4_0"),
        ("mixtral", "Q8_0"),
        ("qwen3moe", "Q4_K"),
        ("gpt-oss", "MXFP4"),
        ("glm4moe", "Q8_0"),
        ("deepseek2", "Q4_0"),
    ],
)
def test_quantized_experts_give_the_logits_of_transformers(tmp_path, model, block_type):
    path = toy_mixture(tmp_path / "toy.gguf", model, block_type=block_type, layers=2)
    with _load(path) as loaded:
        ids = random_ids(loaded.model.config.vocab_size, 80)
        assert max_kl(torch_mixture_logits(path, ids), loaded.logits(ids)) < 1e-6


@_DISTINCT
def test_token_by_token_and_in_pieces_equals_the_full_forward(tmp_path, model):
    with _load(toy_mixture(tmp_path / "toy.gguf", model)) as loaded:
        ids = random_ids(loaded.model.config.vocab_size, 24)
        whole = loaded.logits(ids)
        assert max_kl(whole, stepwise_logits(loaded, ids, prompt=8)) < 1e-5
        np.testing.assert_allclose(logits_in_pieces(loaded, ids, cuts=(1, 2, 17)), whole, atol=1e-4)


@pytest.mark.parametrize(
    ("model", "block_type"),
    [
        ("qwen2moe", "Q4_0"),
        ("qwen3moe", "Q4_K"),
        ("gpt-oss", "Q8_0"),
        ("deepseek2", "Q8_0"),
        ("llama4", "Q4_0"),
    ],
)
def test_streamed_with_the_shuttle_equals_resident(tmp_path, model, block_type):
    path = toy_mixture(tmp_path / "toy.gguf", model, block_type=block_type, layers=2)
    with _load(path, resident="all") as loaded:
        ids = random_ids(loaded.model.config.vocab_size, 40)
        expected = loaded.logits(ids)
        tokens = [token.id for token in loaded.generate(ids[:9], max_tokens=8, ignore_eos=True)]
    with _load(path, resident="none", stream_depth=2, kv_shuttle="on") as loaded:
        np.testing.assert_array_equal(loaded.logits(ids), expected)
        assert [token.id for token in loaded.generate(ids[:9], max_tokens=8, ignore_eos=True)] == tokens


@_DISTINCT
def test_the_bare_functions_give_the_logits_of_the_engine(tmp_path, model):
    path = toy_mixture(tmp_path / "toy.gguf", model)
    with _load(path) as loaded:
        ids = random_ids(loaded.model.config.vocab_size, 20)
        np.testing.assert_allclose(bare_logits(path, ids), loaded.logits(ids), atol=1e-4)


@pytest.mark.parametrize(
    ("model", "values", "message"),
    [
        ("mimo2", {"attention.head_count_kv": [2, 4, 2, 2]}, "one number for layers with a window and one"),
        ("mimo2", {"attention.value_length": 32}, "value_length must be at most key_length 16"),
        ("mimo2", {"attention.sliding_window_pattern": [0, 1]}, "a whole number for each of 4 layers"),
        ("grok-2", {"logit_scale": 0.0}, "grok.logit_scale is a factor of the logits"),
        (
            "grok-2",
            {"rope.scaling.yarn_ext_factor": 0.5},
            "yarn_ext_factor must be 1, the only one that is run, got",
        ),
        ("mistral4", {"attention.temperature_length": 0}, "mistral4.attention.temperature_length must be"),
    ],
)
def test_values_that_make_no_layer_are_refused_by_name(tmp_path, model, values, message):
    values = MIXTURES[model]["values"] | values
    with pytest.raises(GGUFError, match=message):
        _load(toy_mixture(tmp_path / "toy.gguf", model, values=values))


def test_every_name_that_gguf_has_is_run_or_refused_with_its_reason():
    known = set(gguf.MODEL_ARCH_NAMES.values()) - {"(unknown)"}
    refused = {name for names in models._REASONS.values() for name in names}
    assert not refused & set(models._ARCHITECTURES)
    assert known <= refused | set(models._ARCHITECTURES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stacked": 5}, r"ffn_gate_inp.weight must have shape \(8, 64\) by the metadata, got \(5, 64\)"),
        ({"left_out": ("ffn_gate_inp",)}, r"tensor blk.0.ffn_gate_inp.weight is missing: a qwen3moe model"),
        ({"left_out": ("ffn_up_exps",)}, r"tensor blk.0.ffn_up_exps.weight is missing"),
        ({"used": 9}, r"expert_used_count must be at most expert_count, got 9 of 8"),
        ({"used": 0}, r"expert_used_count must be a positive number, got 0"),
        ({"values": {"expert_count": "many"}}, r"expert_count must be of type int"),
    ],
)
def test_a_file_that_makes_no_mixture_is_refused_by_name(tmp_path, options, message):
    with pytest.raises(GGUFError, match=message):
        _load(toy_mixture(tmp_path / "toy.gguf", "qwen3moe", layers=1, **options))


@_EVERY
def test_a_mixture_without_one_of_its_tensors_is_refused_by_name(tmp_path, model):
    name = MIXTURES[model].get("architecture", model)
    with pytest.raises(GGUFError, match=f"tensor blk.[0-9].ffn_down_exps.weight is missing: a {name} model"):
        _load(toy_mixture(tmp_path / "toy.gguf", model, left_out=("ffn_down_exps",)))


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("jamba", "state-space, linear-attention or convolution layers and"),
        ("qwen3next", "state-space, linear-attention or convolution layers and"),
        ("lfm2", "state-space, linear-attention or convolution layers and"),
        ("cogvlm", "reads images and"),
        ("glm-dsa", "picks positions by an index and"),
        ("t5", "no decoder-only language model and"),
        ("dream", "by diffusion and"),
        ("unheard-of", ""),
    ],
)
def test_others_are_refused_by_name_and_still_described(tmp_path, architecture, reason):
    writer = gguf.GGUFWriter(tmp_path / "toy.gguf", architecture)
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(GGUFError, match=f"'{architecture}'.*{reason}.*can't be run: airjax runs.*qwen3moe"):
        _load(tmp_path / "toy.gguf")
    with open_gguf(tmp_path / "toy.gguf") as file:
        assert architecture in format_description(describe(file, build_manifest(file)))
