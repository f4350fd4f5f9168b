"""Layers that pass in pieces: the same bits as layers that pass whole, in less memory."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_experts import toy_mixture
from toy_models import toy_gemma3, toy_llama

import airjax
from airjax import engine, models, sampling
from airjax import plan as plans
from airjax.engine.stages import staged
from airjax.engine.step import block_step
from airjax.engine.workspace import compiled_workspace
from airjax.gguf import open_gguf

_IDS = list(range(3, 70))
_PIECE_BYTES = 20_000
_LAYERS = 4
_WAYS = {
    **{f"depth {depth}": {"stream_depth": depth} for depth in (1, 2, 40)},
    "reader ring": {"tier": "ring"},
    "shuttled KV": {"kv_shuttle": "on"},
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return toy_llama(tmp_path_factory.mktemp("toys") / "toy.gguf", block_type="Q8_0", layers=_LAYERS)


@pytest.fixture
def pieces(monkeypatch):
    _cut(monkeypatch)


def _cut(monkeypatch, piece_bytes=_PIECE_BYTES):
    monkeypatch.setattr(plans.decide, "piece_bytes", lambda backend: piece_bytes)
    monkeypatch.setattr(plans.limits, "WHOLE_FIRST", False)


def _load(path, **options):
    return airjax.load(path, **{"vram_budget_gib": 1, "context": 128, "resident": "none", **options})


def _run(path, **options):
    with _load(path, **options) as loaded:
        draws = list(loaded.generate(_IDS[:20], max_tokens=6, ignore_eos=True))
        return loaded.logits(_IDS).tobytes(), [(token.id, token.logprob) for token in draws]


@pytest.fixture(scope="module")
def whole(toy):
    """By whole layers."""
    return _run(toy)


def test_layers_pass_whole_unless_only_pieces_fit(toy, monkeypatch):
    monkeypatch.setattr(plans.decide, "piece_bytes", lambda backend: _PIECE_BYTES)
    with open_gguf(toy) as file:
        _, config = models.from_gguf(file, "float32")

        def plan(budget):
            options = {"vram_budget_bytes": budget, "ram_budget_bytes": 1 << 30, "stream_depth": 2}
            return plans.plan_layers(file, 64, config, backend="cpu", resident="none", context=128, **options)

        roomy, least = plan(1 << 30)
        assert not any(span.layout.pieces for span in roomy.layers)
        tight, planned = plan(least.peak_bytes - 1)
        assert all(span.layout.pieces for span in tight.layers)
        assert planned.peak_bytes < least.peak_bytes
        with pytest.raises(plans.PlanError, match="GiB"):
            plan(planned.slots_bytes)


@pytest.mark.parametrize("way", _WAYS)
def test_layers_in_pieces_equal_whole_layers(toy, whole, pieces, way):
    assert _run(toy, **_WAYS[way]) == whole


def _sizes(loaded):
    """Bytes of the pieces of each layer."""
    layouts = [span.layout for span in loaded.model.manifest.layers]
    return [[layout.sizes[piece] for piece in layout.pieces] for layout in layouts]


def test_room_for_less_than_a_layer_keeps_pieces_on_the_device(toy, whole, pieces):
    with _load(toy) as loaded:
        sizes, plan = _sizes(loaded), loaded.plan
    everything, largest = sum(map(sum, sizes)), max(map(max, sizes))
    assert all(len(own) == 3 for own in sizes)
    assert plan.bytes_per_sweep == everything and plan.slots_bytes == 3 * largest
    # The first layer that is streamed whole keeps its largest piece.
    for more, resident, kept in ((largest, 0, 1), (sum(sizes[-1]) + largest, 1, 1)):
        budget = (plan.peak_bytes + more) / 2**30
        with _load(toy, resident="auto", vram_budget_gib=budget) as loaded:
            found = loaded.plan
            assert (len(found.resident), len(found.kept)) == (resident, kept)
            assert found.peak_bytes <= found.vram_budget_bytes
            stays = sum(sum(sizes[layer]) for layer in found.resident)
            assert found.bytes_per_sweep == everything - stays - max(sizes[found.kept[0][0]])
            assert loaded.logits(_IDS).tobytes() == whole[0]
            assert loaded.stats.bytes_streamed == found.bytes_per_sweep


@pytest.mark.parametrize("depth", [1, 3])
def test_all_slots_hold_pieces_and_no_more_are_on_the_device(toy, pieces, monkeypatch, depth):
    with _load(toy, stream_depth=depth) as loaded:
        ring, seen = loaded.model.weights.ring, []
        take, sizes = type(ring).take, {size for own in _sizes(loaded) for size in own}

        def counting(self, item, *before):
            weights = take(self, item, *before)
            gc.collect()
            arrays = [array for array in jax.live_arrays() if not array.is_deleted()]
            seen.append(sum(array.dtype == jnp.uint8 and array.nbytes in sizes for array in arrays))
            return weights

        monkeypatch.setattr(type(ring), "take", counting)
        list(loaded.generate(_IDS[:5], max_tokens=2))
        assert seen == [depth] * (2 * _LAYERS * 3)


def test_each_stage_reads_one_piece_and_hands_on_nothing_decoded(toy, pieces):
    with _load(toy) as loaded:
        model = loaded.model
        layout, config = model.manifest.layers[0].layout, model.config
        where = {name: slot.extent for name, slot in layout.tensors}
        kv = engine.new_state(model).kv[0]
        for new in (1, 64):
            x = jax.ShapeDtypeStruct((1, new, config.d_model), jnp.float32)
            positions = jax.ShapeDtypeStruct((1, new), jnp.int32)
            stages = staged(block_step(layout, config, "global", 128), layout, x, kv, positions).stages
            read = [set(stage.buffers) & set(layout.pieces) for stage in stages.values()]
            assert read == [{where["attn_q.weight"]}, {where["ffn_gate.weight"]}, {where["ffn_down.weight"]}]
            handed_on = [var.aval.shape for stage in stages.values() for var in stage.gives]
            assert all(shape == kv.k.shape or np.prod(shape) <= new * config.d_ff for shape in handed_on)


def test_a_batch_in_pieces_equals_whole_layers(toy, monkeypatch):
    prompts = [_IDS[:3], _IDS[:40], _IDS[5:6]]

    def run():
        tokens = [[] for _ in prompts]
        with _load(toy, max_batch=3) as loaded:
            chain = sampling.temperature(0.8)
            drawn = loaded.generate_batch(prompts, samplers=chain, max_tokens=6, ignore_eos=True)
            for number, token in drawn:
                tokens[number].append((token.id, token.logprob))
        return tokens

    expected = run()
    _cut(monkeypatch)
    assert run() == expected


def test_a_long_cache_and_pieces(toy, monkeypatch):
    monkeypatch.setattr(plans.limits, "KV_BLOCK_BYTES", 1)
    options = {"kv_shuttle": "on", "context": 256, "prefill_chunk": 64}

    def run():
        with _load(toy, **options) as loaded:
            draws = list(loaded.generate(_IDS * 3, max_tokens=4, ignore_eos=True))
            return [token.id for token in draws], [token.logprob for token in draws]

    expected = run()
    _cut(monkeypatch)
    tokens, logprobs = run()
    assert tokens == expected[0]
    # Other programs: which sums XLA fuses, and so how they round, depends on the processor; a prompt in chunks of one
    # token is off by 1e-3 in this model.
    assert logprobs == pytest.approx(expected[1], abs=1e-3)


def test_attention_can_be_seen_of_layers_in_pieces(toy, monkeypatch):
    def seen():
        with _load(toy) as loaded:
            inside = loaded.capture(_IDS, hidden=range(_LAYERS + 1), attention=range(_LAYERS))
            return jax.tree.map(np.asarray, inside)

    expected = seen()
    _cut(monkeypatch)
    # Other programs, see above.
    jax.tree.map(lambda got, wanted: np.testing.assert_allclose(got, wanted, atol=2e-5), seen(), expected)


@pytest.mark.parametrize("make", ["gemma3", "mixture"])
def test_other_blocks_pass_in_pieces(tmp_path, monkeypatch, make):
    if make == "gemma3":
        path = toy_gemma3(tmp_path / "toy.gguf", layers=2, pattern=2, window=30, block_type="Q8_0")
    else:
        path = toy_mixture(tmp_path / "toy.gguf", "qwen3moe", block_type="Q4_0", layers=2, count=8, used=2)
    expected = _run(path)
    _cut(monkeypatch, 24_000)
    with _load(path) as loaded:
        assert all(len(span.layout.pieces) > 1 for span in loaded.model.manifest.layers)
    assert _run(path) == expected


def test_the_plan_covers_the_compiled_workspace_of_stages(toy, pieces):
    with _load(toy, context=64) as loaded:
        model = loaded.model
        assert 0 < compiled_workspace(model.manifest, model.config, model.plan) <= model.plan.workspace_bytes
