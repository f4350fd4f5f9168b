"""The gemma4 architecture against transformers: layers that differ in their heads, experts beside all."""

import numpy as np
import pytest
from divergence import max_kl
from other_ways import bare_logits, stepwise_logits
from toy_experts import random_ids
from toy_gemma4 import torch_gemma4_logits, toy_gemma4

import airjax
from airjax import sampling
from airjax.gguf import GGUFError

_GREEDY = {"sampler": sampling.greedy(), "max_tokens": 3, "ignore_eos": True}


def _load(path, **options):
    return airjax.load(path, vram_budget_gib=1, context=256, compute_dtype="float32", **options)


@pytest.mark.parametrize(
    "options", [{}, {"experts": True}, {"experts": True, "fused": False, "own_values": True}]
)
def test_a_random_model_gives_the_logits_of_transformers(tmp_path, options):
    path = toy_gemma4(tmp_path / "toy.gguf", **options)
    with _load(path) as loaded:
        ids = random_ids(loaded.model.config.vocab_size, 70)
        assert max_kl(torch_gemma4_logits(path, ids), loaded.logits(ids)) < 1e-6


def test_token_by_token_and_without_the_engine_equals_the_full_forward(tmp_path):
    path = toy_gemma4(tmp_path / "toy.gguf", experts=True)
    with _load(path) as loaded:
        ids = random_ids(loaded.model.config.vocab_size, 24)
        whole = loaded.logits(ids)
        assert max_kl(whole, stepwise_logits(loaded, ids, prompt=18)) < 1e-5
        np.testing.assert_allclose(bare_logits(path, ids), whole, atol=1e-4)


def test_a_cache_whose_layers_differ_is_the_same_on_the_host_in_pages_and_on_disk(tmp_path):
    path = toy_gemma4(tmp_path / "toy.gguf", experts=True, block_type="Q4_0")
    with _load(path, resident="all") as loaded:
        ids = random_ids(loaded.model.config.vocab_size, 40)
        logits = loaded.logits(ids)
        tokens = [token.id for token in loaded.generate(ids[:11], **_GREEDY)]
        # Of a row outside the window twice as much as inside.
        assert [loaded.model.config.kv_shape(kind) for kind in ("local", "global")] == [(2, 16), (1, 64)]
        session = loaded.session(ids[:11])
        loaded.save(session, str(tmp_path / "s.session"))
    with _load(path, resident="none", stream_depth=2, kv_shuttle="on") as loaded:
        np.testing.assert_array_equal(loaded.logits(ids), logits)
        session = loaded.restore(str(tmp_path / "s.session"))
        assert [token.id for token in loaded.resume(session, **_GREEDY)] == tokens
    with _load(path, max_batch=2) as loaded:
        greedy = {"samplers": sampling.greedy(), "max_tokens": 3, "ignore_eos": True}
        batch = list(loaded.generate_batch([ids[:11], ids[20:33]], **greedy))
        assert [token.id for n, token in batch if n == 0] == tokens


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"attention.shared_kv_layers": 3}, "must leave keys and values to a layer with a window"),
        ({"attention.shared_kv_layers": 4}, "must leave keys and values to a layer with a window"),
        ({"attention.shared_kv_layers": 0.5}, "must leave keys and values to a layer with a window"),
        ({"embedding_length_per_layer_input": 1 << 16}, "must be between 0 and 65535, got 65536"),
        ({"embedding_length_per_layer_input": 16}, "tensor per_layer_token_embd.weight is missing"),
        ({"feed_forward_length": [128, 128, 0, 128]}, "feed_forward_length must be at least 1 in each layer"),
        ({"feed_forward_length": [128, 128, 256, 128]}, "blk.2.ffn_up.weight must have shape"),
        ({"attention.head_count_kv": [2, 1, 1, 1]}, "one number for layers with a window"),
        ({"attention.head_count_kv": [2, 1]}, "one number for layers with a window"),
        ({"attention.sliding_window_pattern": [False, True, True, True]}, "must let each so manyth of 4"),
        ({"attention.key_length_swa": 15}, "key_length_swa must be even"),
        ({"attention.sliding_window": 0}, "sliding_window must be at least 1"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name(tmp_path, values, message):
    with pytest.raises(GGUFError, match=message):
        _load(toy_gemma4(tmp_path / "toy.gguf", values=values))


def test_experts_beside_an_embedding_for_each_layer_are_refused(tmp_path):
    with pytest.raises(
        GGUFError, match="can't be run with an embedding for each layer, shared keys and values"
    ):
        _load(toy_gemma4(tmp_path / "toy.gguf", experts=True, per_layer=16))
