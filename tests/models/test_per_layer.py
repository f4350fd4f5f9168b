"""Models with an embedding of each token for each layer, and with layers that read the cache of earlier ones."""

import dataclasses

import cpu_kernel
import jax
import numpy as np
import pytest
from divergence import max_kl
from other_ways import bare_logits, logits_in_pieces, stepwise_logits
from toy_experts import random_ids
from toy_gemma3n import toy_gemma3n
from toy_gemma4 import torch_gemma4_logits, toy_gemma4
from toy_server import serve_toy

import airjax
from airjax import engine, models, sampling
from airjax import plan as plans
from airjax.engine.drafting import rows
from airjax.engine.generation import prefill
from airjax.engine.step import unpack_globals
from airjax.gguf import open_gguf
from airjax.quants import selftest

_SMALL = {"own_values": True, "per_layer": 16, "shared": 3, "layers": 6}
_OPTIONS = {
    "small": _SMALL,
    "embeddings alone": _SMALL | {"shared": 0},
    "shared keys and values alone": _SMALL | {"per_layer": 0},
    "another number of layers that share": _SMALL | {"shared": 4},
    "matrices of keys and values that nobody reads": _SMALL | {"unused": True},
    "a float": _SMALL | {"values": {"attention.shared_kv_layers": 3.0}},
    "Q4_0": _SMALL | {"block_type": "Q4_0", "per_layer": 64},
    "Q6_K": _SMALL | {"block_type": "Q6_K", "per_layer": 256},
}
_GREEDY = {"sampler": sampling.greedy(), "max_tokens": 6, "ignore_eos": True}
# Of logits and greedy tokens; a sliding window of 8 is passed several times.
_COUNT, _PROMPT = 70, 23


def _load(path, **options):
    return airjax.load(path, **{"vram_budget_gib": 1, "context": 256, "compute_dtype": "float32"} | options)


def _run(path, **options):
    with _load(path, **options) as loaded:
        ids = random_ids(loaded.model.config.vocab_size, _COUNT)
        draws = list(loaded.generate(ids[:_PROMPT], **_GREEDY))
        return loaded.logits(ids).tobytes(), [(token.id, token.logprob) for token in draws]


def _gemma3n(path, **options):
    return toy_gemma3n(path, **{key: options[key] for key in options if key not in ("own_values", "unused")})


_WRITERS = {"gemma4": toy_gemma4, "gemma3n": _gemma3n}


@pytest.fixture(scope="module", params=_WRITERS)
def toy(request, tmp_path_factory):
    options = {"block_type": "Q8_0", "per_layer": 32, "separate_output": True}
    return _WRITERS[request.param](tmp_path_factory.mktemp("toy") / "toy.gguf", **_SMALL | options)


@pytest.fixture(scope="module")
def resident(toy):
    return _run(toy, resident="all")


@pytest.mark.parametrize("options", _OPTIONS)
def test_a_random_model_gives_the_logits_of_transformers(tmp_path, options):
    path = toy_gemma4(tmp_path / "toy.gguf", **_OPTIONS[options])
    with _load(path) as loaded:
        ids = random_ids(loaded.model.config.vocab_size, _COUNT)
        assert max_kl(torch_gemma4_logits(path, ids), loaded.logits(ids)) < 1e-6


def test_what_a_token_passes_on_and_what_layers_share_changes_the_logits(tmp_path):
    """Else the tests above would say nothing about it."""
    ids = list(range(260, 300))
    with _load(toy_gemma4(tmp_path / "small.gguf", **_SMALL)) as loaded:
        logits = loaded.logits(ids)
    path = toy_gemma4(tmp_path / "other.gguf", **_SMALL | {"shared": 4})
    with _load(path) as loaded:
        assert max_kl(logits, loaded.logits(ids)) > 1e-3
    path = toy_gemma4(tmp_path / "none.gguf", **_SMALL | {"per_layer": 0})
    with _load(path) as loaded:
        assert max_kl(logits, loaded.logits(ids)) > 1e-3


def test_each_layer_reads_the_cache_of_the_last_one_that_sees_as_much(toy):
    with _load(toy) as loaded:
        model = loaded.model
        assert model.caches == [0, 1, 2, 1, 2, 1]
        state = engine.new_state(model)
        held = [layer.nbytes for layer in state.kv]
        assert all(held[:3]) and not any(held[3:])
        state.close()
        # Of 256 positions, in float32: two heads, which are wider outside the window in Gemma 4.
        widths = (16, 64, 16) if model.config.architecture == "gemma4" else (16, 16, 16)
        assert model.plan.kv_bytes == sum(2 * 4 * 256 * 2 * width for width in widths)


@pytest.mark.parametrize("writer", _WRITERS)
def test_token_by_token_in_pieces_and_without_the_engine_equals_the_full_forward(tmp_path, writer):
    path = _WRITERS[writer](tmp_path / "toy.gguf", **_SMALL)
    with _load(path) as loaded:
        ids = random_ids(loaded.model.config.vocab_size, _COUNT)
        whole = loaded.logits(ids)
        assert max_kl(whole, stepwise_logits(loaded, ids, prompt=51)) < 1e-5
        np.testing.assert_allclose(logits_in_pieces(loaded, ids, cuts=(1, 2, 17, 50)), whole, atol=1e-4)
        np.testing.assert_allclose(bare_logits(path, ids), whole, atol=1e-4)
    with _load(path, prefill_chunk=4) as loaded:
        assert min(loaded.plan.kv_slots) == 64  # the caches inside the window go round
        assert max_kl(whole, loaded.logits(ids)) < 1e-6


@pytest.mark.parametrize(
    "way",
    [
        {"resident": "none"},
        {"resident": "none", "stream_depth": 1},
        {"resident": "none", "tier": "ring"},
    ],
)
def test_streamed_layers_give_the_bits_of_resident_ones(toy, resident, way):
    assert _run(toy, **way) == resident


def test_a_budget_between_keeps_some_layers_and_gives_the_same_bits(toy, resident):
    with _load(toy, resident="none", stream_depth=2) as loaded:
        plan, layer_bytes = loaded.plan, loaded.model.manifest.layers[-1].nbytes
    budget = plan.peak_bytes + layer_bytes
    with _load(toy, stream_depth=2, vram_budget_gib=budget / 2**30) as loaded:
        assert 0 < len(loaded.plan.resident) < 6
    assert _run(toy, stream_depth=2, vram_budget_gib=budget / 2**30) == resident


def test_layers_in_pieces_give_what_whole_ones_give(toy, resident, monkeypatch):
    monkeypatch.setattr(plans.decide, "piece_bytes", lambda backend: 20_000)
    monkeypatch.setattr(plans.limits, "WHOLE_FIRST", False)
    with _load(toy, resident="none") as loaded:
        assert all(span.layout.pieces for span in loaded.model.manifest.layers)
    (logits, draws), (expected, others) = _run(toy, resident="none"), resident
    # XLA fuses and so rounds what lies about a cut in another way.
    np.testing.assert_allclose(*(np.frombuffer(own, np.float32) for own in (logits, expected)), atol=1e-3)
    assert [token for token, _ in draws] == [token for token, _ in others]


def test_the_layers_own_embedding_leaves_the_device_before_a_layer_does(toy, resident):
    with _load(toy) as loaded:
        everything = loaded.plan.peak_bytes
        table = loaded.model.manifest.globals["per_layer_token_embd.weight"].nbytes
        assert not loaded.plan.host_tables and "per_layer_token_embd.weight" in loaded.model.globals
    for budget in (everything - 1, everything - table):
        with _load(toy, vram_budget_gib=budget / 2**30) as loaded:
            assert loaded.plan.host_tables == ("per_layer_token_embd.weight",)
            assert not loaded.plan.streamed and loaded.plan.peak_bytes == everything - table
            assert "per_layer_token_embd.weight" not in loaded.model.globals
            assert "the layers' own embedding stays on the host" in plans.format_plan(loaded.plan)
    assert _run(toy, vram_budget_gib=(everything - table) / 2**30) == resident
    with _load(toy, vram_budget_gib=(everything - table - 1) / 2**30) as loaded:
        assert loaded.plan.streamed


def test_both_embeddings_on_the_host_give_the_bits_of_those_on_the_device(toy, resident):
    with _load(toy, resident="none") as loaded:
        spans = loaded.model.manifest.globals
        tight = (loaded.plan.peak_bytes - spans["per_layer_token_embd.weight"].nbytes - 1) / 2**30
    with _load(toy, resident="none", vram_budget_gib=tight) as loaded:
        assert set(loaded.plan.host_tables) == {"token_embd.weight", "per_layer_token_embd.weight"}
    assert _run(toy, resident="none", vram_budget_gib=tight) == resident


def test_a_batch_gives_what_each_sequence_gives_alone(toy):
    with _load(toy) as loaded:
        ids = random_ids(loaded.model.config.vocab_size, 90)
        prompts, greedy = [ids[:70], ids[20:80], ids[10:90]], {"max_tokens": 30, "ignore_eos": True}
        alone = [[token.id for token in loaded.generate(part, **greedy)] for part in prompts]
        assert len(set(alone[0])) > 10
    # The second batch has too few pages for all three.
    for options in ({}, {"resident": "none", "stream_depth": 2, "kv_tokens": 256}):
        with _load(toy, max_batch=3, **options) as loaded:
            together = [[] for _ in prompts]
            for n, token in loaded.generate_batch(prompts, samplers=sampling.greedy(), **greedy):
                together[n].append(token.id)
        assert together == alone


def test_runs_of_layers_in_one_program_share_their_caches_too(tmp_path, monkeypatch):
    options = {"block_type": "Q4_K", "per_layer": 256, "separate_output": True, "layers": 4, "shared": 2}
    path = toy_gemma4(tmp_path / "toy.gguf", **_SMALL | options)
    ids, greedy = random_ids(300, 30), {"max_tokens": 6, "ignore_eos": True}

    def run():
        with _load(path, resident="all") as loaded:
            relaid = all(loaded.model.weights.relaid(layer) for layer in range(4))
            return [token.id for token in loaded.generate(ids, **greedy)], relaid

    expected, _ = run()
    cpu_kernel.install(monkeypatch)
    assert run() == (expected, True)
    with _load(path, resident="all", max_batch=1) as loaded:
        batch = loaded.generate_batch([ids], samplers=sampling.greedy(), **greedy)
        assert [token.id for _, token in batch] == expected
    selftest._passes.cache_clear()


def test_sessions_are_saved_forked_and_rolled_back(toy, tmp_path):
    with _load(toy) as loaded:
        ids = random_ids(loaded.model.config.vocab_size, 40)
        session = loaded.session(ids[:11])
        first = [token.id for token in loaded.resume(session, **_GREEDY)]
        other = loaded.fork(session)
        loaded.save(session, str(tmp_path / "s.session"))
        on = [token.id for token in loaded.resume(session, **_GREEDY)]
        assert [token.id for token in loaded.resume(other, **_GREEDY)] == on
        loaded.rollback(other, 2 * len(on))
        assert [token.id for token in loaded.resume(other, **_GREEDY)] == first
    with _load(toy, resident="none", stream_depth=2, context=200) as loaded:
        session = loaded.restore(str(tmp_path / "s.session"))
        assert [token.id for token in loaded.resume(session, **_GREEDY)] == on


def test_branches_that_grow_from_one_another_know_their_log_probability(tmp_path):
    with _load(toy_gemma4(tmp_path / "toy.gguf", **_SMALL), max_batch=4) as loaded:
        ids = random_ids(loaded.model.config.vocab_size, 61)
        for beam in engine.beam_search(loaded.model, ids, beams=3, max_tokens=6, length_power=0):
            own = np.asarray(jax.nn.log_softmax(loaded.logits([*ids, *beam.ids])))
            expected = sum(own[len(ids) - 1 + at, token] for at, token in enumerate(beam.ids))
            assert beam.logprob == pytest.approx(expected, abs=1e-3)


def test_attention_is_seen_of_layers_that_share_a_cache(toy):
    with _load(toy) as loaded:
        ids = random_ids(loaded.model.config.vocab_size, 30)
        seen = loaded.capture(ids, attention=(1, 5))
        for weights in seen.attention.values():
            np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
            assert not np.triu(weights, 1).any()


def test_hidden_states_and_steering_see_the_models_width(tmp_path):
    with _load(toy_gemma4(tmp_path / "toy.gguf", **_SMALL)) as loaded:
        d, layers = loaded.model.config.d_model, loaded.model.config.n_layers
        ids = random_ids(loaded.model.config.vocab_size, 30)
        seen = loaded.capture(ids, hidden=range(layers + 1))
        assert {hidden.shape for hidden in seen.hidden.values()} == {(30, d)}
        lens = loaded.logit_lens(ids, top=1)
        np.testing.assert_array_equal(lens.ids[-1, :, 0], loaded.logits(ids).argmax(-1))
        pushed = loaded.capture(ids, hidden=(2, 6), steering={2: np.ones(d, np.float32)})
        np.testing.assert_allclose(pushed.hidden[2], seen.hidden[2] + 1, atol=1e-5)
        assert not np.allclose(pushed.hidden[6], seen.hidden[6], atol=1e-2)


def test_hidden_states_side_by_side_are_neither_captured_nor_steered(tmp_path):
    with _load(toy_gemma3n(tmp_path / "toy.gguf")) as loaded:
        for options in ({"hidden": (2,)}, {"steering": {2: np.ones(64, np.float32)}}):
            with pytest.raises(ValueError, match="are 4 side by side, which can't be captured or steered"):
                loaded.capture([5, 6, 7], **options)


def test_an_embedded_text_has_the_models_width(toy):
    with _load(toy) as loaded:
        model, ids = loaded.model, random_ids(loaded.model.config.vocab_size, 30)
        state = engine.new_state(model)
        (x, count), *_ = prefill(model, state, ids)
        outside = unpack_globals(model.globals, model.layouts)
        each = np.asarray(model.architecture.gathered(outside, x[0, :count], model.config))
        state.close()
    assert each.shape == (30, model.config.d_model)
    with serve_toy(toy) as client:
        body = client.post("/v1/embeddings", json={"input": ids}).json()
    mean = each.mean(0)
    np.testing.assert_allclose(body["data"][0]["embedding"], mean / np.linalg.norm(mean), atol=1e-4)


def test_trees_of_drafts_are_not_taken_where_each_row_takes_the_steps_of_decoding(toy, monkeypatch):
    with _load(toy) as loaded:
        state = engine.new_state(loaded.model)
        assert not rows.takes_trees(loaded.model, state, 9)
        monkeypatch.setattr(rows, "exact", lambda model: False)
        assert rows.takes_trees(loaded.model, state, 9)
        state.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"kv_shuttle": "on"},
            "whose layers share their KV cache keeps it on the device: pass --kv_shuttle=off",
        ),
        ({"draft": "self", "stream_depth": 1}, "draft=self leaves layers out"),
    ],
)
def test_what_such_a_model_can_t_do_is_refused(toy, options, message):
    with _load(toy, resident="none", stream_depth=1) as loaded:
        plan, layer_bytes = loaded.plan, loaded.model.manifest.layers[-1].nbytes
    budget = (plan.peak_bytes + 2 * layer_bytes) / 2**30 if "draft" in options else 1
    with pytest.raises(ValueError, match=message):
        _load(toy, vram_budget_gib=budget, **options).close()


def test_it_is_not_cut_among_devices(toy):
    with open_gguf(toy) as file:
        _, config = models.from_gguf(file, "float32")
    for own in (config, dataclasses.replace(config, local_head_dim=0)):
        with pytest.raises(ValueError, match="share their KV cache can't be cut among devices yet"):
            models.check_cuts("toy", own, [], 2)
