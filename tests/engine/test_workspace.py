"""The workspace that the compiler counts."""

import dataclasses

import pytest
from toy_models import toy_llama

import airjax
from airjax.engine.workspace import compiled_workspace


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = toy_llama(tmp_path_factory.mktemp("toy") / "toy.gguf", layers=2)
    with airjax.load(path, vram_budget_gib=1, context=256, resident="all", prefill_chunk=64) as engine:
        yield engine.model


def workspace(model, **changes):
    return compiled_workspace(model.manifest, model.config, dataclasses.replace(model.plan, **changes))


def test_it_holds_the_scores_of_a_chunk_and_less_than_was_planned(model):
    scores = 4 * 64 * 256 * 4  # heads, rows, slots, float32
    assert scores < workspace(model) < model.plan.workspace_bytes


def test_it_grows_with_the_chunk_and_with_the_batch(model):
    small = workspace(model, prefill_chunk=8)
    assert small < workspace(model)
    assert small < workspace(model, prefill_chunk=8, max_batch=64, kv_tokens=64 * 256)


def test_a_shuttled_cache_arrives_in_another_order_and_is_copied(model):
    kv_bytes = model.plan.kv_bytes // model.config.n_layers
    assert workspace(model, shuttle=True, kv_block=256) > kv_bytes


def test_a_cache_in_pieces_needs_the_copy_of_one_piece(model):
    whole = workspace(model, shuttle=True, kv_block=256, prefill_chunk=1)
    assert workspace(model, shuttle=True, kv_block=64, prefill_chunk=1) < whole
