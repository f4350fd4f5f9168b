"""How many programs a run compiles: layouts x kinds of layer x shapes, whatever the number of layers."""

import jax
import pytest
from toy_models import toy_gemma3, toy_llama

import airjax
from airjax.engine import step


@pytest.fixture(autouse=True)
def _fresh():
    step.block_step.cache_clear()


def _programs():
    """Blocks made: each compiles once for each number of rows."""
    return step.block_step.cache_info().currsize


def _run(path, prompt, tokens, **options):
    with airjax.load(path, vram_budget_gib=1, context=512, **options) as engine:
        list(engine.generate(list(range(prompt)), max_tokens=tokens, ignore_eos=True))
        spans, kinds = engine.model.manifest.layers, engine.model.kinds
        blocks = {(span.layout, kind) for span, kind in zip(spans, kinds, strict=True)}
        config = engine.model.config
        compiled = [step.block_step(layout, config, kind, 256)._cache_size() for layout, kind in blocks]
        return len({span.layout for span in spans}), len(blocks), compiled


@pytest.mark.parametrize("resident", ["none", "all"])
def test_layers_of_one_layout_share_their_programs(tmp_path, resident):
    path = toy_llama(tmp_path / "toy.gguf", layers=12)
    layouts, blocks, compiled = _run(path, 20, 6, resident=resident)
    # The toy's layers are a multiple of 32 bytes long, so they begin at 0 or at 32 past a multiple of 64.
    assert layouts <= 2 and blocks == layouts
    assert _programs() == blocks
    assert compiled == [2] * blocks  # a prompt of 64 rows, and decoding


def test_a_second_prompt_of_another_length_compiles_nothing(tmp_path):
    path = toy_llama(tmp_path / "toy.gguf", layers=2)
    with airjax.load(path, vram_budget_gib=1, context=512) as engine:
        counts = []
        for prompt in (20, 7, 64, 33):
            list(engine.generate(list(range(prompt)), max_tokens=3, ignore_eos=True))
            span, kind = engine.model.manifest.layers[0], engine.model.kinds[0]
            counts.append(step.block_step(span.layout, engine.model.config, kind, 256)._cache_size())
    assert counts == [2, 2, 2, 2]


def test_kinds_of_layer_have_programs_of_their_own(tmp_path):
    path = toy_gemma3(tmp_path / "toy.gguf", layers=7)
    layouts, blocks, _ = _run(path, 20, 3)
    assert layouts < blocks <= 2 * layouts


def test_runs_of_a_batch_have_programs_of_their_own_where_these_are_kept_on_disk(tmp_path):
    runs = range(16), range(16, 32)
    before = jax.config.values["jax_compilation_cache_dir"]
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        shared = {step.graph_of(run) for run in runs}
        jax.config.update("jax_compilation_cache_dir", str(tmp_path))
        own = {step.graph_of(run) for run in runs}
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert (len(shared), len(own)) == (1, 2)
