"""The llama architecture against transformers, on toys with each option and block type."""

import numpy as np
import pytest
from gguf import GGMLQuantizationType as GGMLType
from torch_models import max_kl, torch_logits
from toy_models import VOCABULARY, toy_llama

import airjax
from airjax import quants

_IDS = np.random.default_rng(0).integers(0, VOCABULARY, 90).tolist()


def _logits(path, ids=_IDS, **options):
    with airjax.load(path, vram_budget_gib=1, context=256, **options) as engine:
        return engine.logits(ids)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tied": True},
        {"kv_heads": 4},
        {"kv_heads": 1},
        {"head_dim": 32},
        {"biases": True},
        {"rope_factors": True, "rope_base": 500_000.0},
        {"rope_linear": 4.0},
        {"layers": 1},
    ],
    ids=str,
)
def test_logits_are_those_of_transformers(tmp_path, options):
    path = toy_llama(tmp_path / "toy.gguf", **options)
    assert max_kl(torch_logits(path, _IDS), _logits(path)) < 1e-6


@pytest.mark.parametrize("kind", sorted(kind.name for kind in quants.supported()))
def test_every_block_type_gives_the_logits_of_transformers(tmp_path, kind):
    path = toy_llama(tmp_path / "toy.gguf", kind=kind, layers=2)
    assert max_kl(torch_logits(path, _IDS), _logits(path)) < 1e-6


@pytest.mark.parametrize("kind", ["Q4_1", "Q6_K"])
def test_token_by_token_gives_the_logits_of_transformers(tmp_path, kind):
    path = toy_llama(tmp_path / "toy.gguf", kind=kind)
    got = _logits(path, _IDS[:30], prefill_chunk=1)
    # Decoding on a CPU rounds activations to 16 bits.
    assert max_kl(torch_logits(path, _IDS[:30]), got) < 1e-4


def test_another_seed_gives_other_logits(tmp_path):
    one, two = (toy_llama(tmp_path / f"{seed}.gguf", seed=seed) for seed in (1, 2))
    assert max_kl(_logits(one), _logits(two)) > 0.01


def test_the_blocks_by_hand_equal_the_engine(tmp_path):
    """The bare functional level: pure functions over weights, no engine, no streaming."""
    import jax
    import jax.numpy as jnp

    from airjax import gguf, models
    from airjax.types import LayerKV

    path = toy_llama(tmp_path / "toy.gguf", kind=GGMLType.Q4_0.name)
    with gguf.open_gguf(path) as file:
        architecture, config = models.from_gguf(file, "float32")
        manifest = gguf.build_manifest(file)

        def weights(span):
            buffers = tuple(jnp.asarray(file.maps[e.shard][e.start : e.start + e.nbytes]) for e in span.extents)
            return models.unpack(buffers, span.layout)

        shared = {name: w for span in manifest.globals.values() for name, w in weights(span).items()}
        positions = jnp.arange(len(_IDS), dtype=jnp.int32)[None]
        x = architecture.embed(shared, jnp.asarray([_IDS]), config)
        for layer, span in enumerate(manifest.layers):
            empty = jnp.zeros((1, config.n_kv_heads, 128, config.head_dim))
            kind = architecture.layer_kind(config, layer)
            block = jax.jit(architecture.block, static_argnames=("config", "kind", "length"))
            x, _ = block(weights(span), x, LayerKV(empty, empty), positions, config=config, kind=kind, length=128)
        logits = architecture.unembed(shared, x[0], config)
    assert max_kl(_logits(path), np.asarray(logits)) < 1e-9
