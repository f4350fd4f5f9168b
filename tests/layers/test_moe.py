"""Routing and grouping against their definitions by hand, and against transformers' DeepSeek."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from airjax import layers


def test_weights_of_chosen_experts_are_their_share_of_the_softmax():
    logits = jnp.log(jnp.array([[1.0, 4.0, 2.0, 3.0]]))
    ids, weights = layers.choose(logits, layers.Routing(2))
    np.testing.assert_array_equal(ids, [[1, 3]])
    np.testing.assert_allclose(weights, [[0.4, 0.3]], rtol=1e-6)
    _, weights = layers.choose(logits, layers.Routing(2, normalized=True, scale=2.0))
    np.testing.assert_allclose(weights, [[8 / 7, 6 / 7]], rtol=1e-6)
    _, weights = layers.choose(logits, layers.Routing(2, "softmax of chosen"))
    np.testing.assert_allclose(weights, [[4 / 7, 3 / 7]], rtol=1e-6)


@pytest.mark.parametrize("spread", [1.0, 30.0, 1000.0])
def test_the_softmax_over_the_chosen_is_the_normalized_one_over_all(spread):
    logits = (spread * np.random.default_rng(0).normal(size=(40, 16))).astype(np.float32)
    ids, weights = layers.choose(jnp.asarray(logits), layers.Routing(4, normalized=True))
    np.testing.assert_array_equal(ids, np.argsort(-logits, axis=-1)[:, :4])
    best = np.sort(logits.astype(np.float64), axis=-1)[:, ::-1][:, :4]
    share = np.exp(best - best[:, :1])
    np.testing.assert_allclose(weights, share / share.sum(axis=-1, keepdims=True), rtol=2e-6, atol=1e-30)


def test_a_bias_moves_the_choice_but_not_the_weights():
    logits = jnp.array([[0.0, 1.0, 2.0, -1.0]])
    ids, weights = layers.choose(logits, layers.Routing(2, "sigmoid"), bias=jnp.array([1.0, 0.0, 0.0, 0.0]))
    np.testing.assert_array_equal(ids, [[0, 2]])
    np.testing.assert_allclose(weights, 1 / (1 + np.exp([[0.0, -2.0]])), rtol=1e-6)


def test_routing_in_groups_equals_deepseek_v3s():
    rng = np.random.default_rng(0)
    logits, bias = rng.normal(size=(50, 16)).astype(np.float32), rng.normal(size=16).astype(np.float32)
    config = transformers.DeepseekV3Config(
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        hidden_size=16,
        norm_topk_prob=True,
    )
    router = transformers.models.deepseek_v3.modeling_deepseek_v3.DeepseekV3TopkRouter(config)
    router.weight.data = torch.eye(16)
    router.e_score_correction_bias = torch.tensor(bias)
    router.routed_scaling_factor = 2.5
    with torch.inference_mode():
        _, their_weights, theirs = router(torch.tensor(logits))
    routing = layers.Routing(4, "sigmoid", True, 2.5, groups=4, groups_used=2, group_best=2)
    ids, weights = layers.choose(jnp.asarray(logits), routing, jnp.asarray(bias))
    for row in range(50):
        ours = dict(zip(np.asarray(ids[row]).tolist(), np.asarray(weights[row]).tolist(), strict=True))
        expected = dict(zip(theirs[row].tolist(), their_weights[row].tolist(), strict=True))
        assert ours == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("pairs", "count", "rows"), [(1, 1, 1), (7, 3, 2), (96, 8, 16), (200, 5, 64), (40, 40, 4)]
)
def test_every_pair_is_in_one_block_of_its_expert(pairs, count, rows):
    for seed, spread in ((0, count + 1), (1, 1), (2, 2)):
        expert = np.random.default_rng(seed).integers(0, spread, pairs).astype(np.int32)
        groups = layers.group_by_expert(jnp.asarray(expert), count, rows)
        held = np.asarray(groups.pairs)
        for block, of_block in enumerate(np.asarray(groups.expert)):
            inside = held[block][held[block] < pairs]
            assert (expert[inside] == of_block).all()
            assert (len(inside) > 0) == (block < int(groups.used))
        assert sorted(held[held < pairs].tolist()) == np.flatnonzero(expert < count).tolist()
