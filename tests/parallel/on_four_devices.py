"""Checks of pipelines and replicas, for a process that has four devices; see test_forms.py."""

import dataclasses
import json
import re
import threading

import jax
import numpy as np
import pytest
from toy_experts import toy_mixture
from toy_gemma4 import toy_gemma4
from toy_models import toy_gemma3, toy_llama
from toy_server import serve_toy

import airjax
from airjax import sampling
from airjax.engine.draws import Draws
from airjax.engine.lookup import embed
from airjax.engine.pipeline import at_stages, divide
from airjax.engine.scheduler import Scheduler
from airjax.plan import PlanError, decide, format_plan
from airjax.server.sampler import Settings, make_sampler
from airjax.server.warm import Batch, warm_up
from airjax.server.worker import Order
from airjax.streaming import Links, Turns

FORMS = ("pipeline", "replica")
_PROMPTS = [np.random.default_rng(n).integers(0, 60, size).tolist() for n, size in enumerate((3, 40, 1, 20))]
_IDS = np.random.default_rng(9).integers(0, 60, 120).tolist()


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return toy_llama(tmp_path_factory.mktemp("toys") / "toy.gguf", block_type="Q8_0", layers=6)


def _load(path, **options):
    return airjax.load(path, **{"vram_budget_gib": 1, "context": 256, **options})


def _outputs(path, **options):
    """Logits, greedy tokens, and tokens of a batch that is larger than one lane's."""
    drawn = {}
    with _load(path, max_batch=2, **options) as loaded:
        ids = [token % loaded.model.config.vocab_size for token in _IDS]
        logits = np.asarray(loaded.logits(ids))
        alone = [token.id for token in loaded.generate(ids[:9], max_tokens=6, ignore_eos=True)]
        sampler = sampling.temperature(0.8)
        for n, token in loaded.generate_batch(_PROMPTS, samplers=sampler, max_tokens=6, ignore_eos=True):
            drawn.setdefault(n, []).append(token.id)
    return logits, alone, drawn


@pytest.fixture(scope="module")
def alone(toy):
    return _outputs(toy)


@pytest.mark.parametrize(
    "options",
    [
        {"parallel": "pipeline", "devices": 4, "resident": "all"},
        {"parallel": "pipeline", "devices": 3, "resident": "none", "stream_depth": 1},
        {"parallel": "pipeline", "devices": 2, "resident": "none", "tier": "ring"},
        {"parallel": "replica", "devices": 2, "resident": "all"},
        {"parallel": "replica", "devices": 2, "resident": "none"},
        {"parallel": "replica", "devices": 2, "resident": "none", "tier": "ring"},
    ],
    ids=lambda options: " ".join(str(value) for value in options.values()),
)
def test_several_devices_give_the_bits_of_one(toy, alone, options):
    logits, greedy, batch = _outputs(toy, **options)
    assert np.array_equal(logits, alone[0])
    assert (greedy, batch) == alone[1:]


def test_chunks_of_a_prompt_follow_one_another_through_the_stages(toy):
    one = _outputs(toy, resident="none", prefill_chunk=64)
    several = _outputs(toy, resident="none", prefill_chunk=64, devices=2, parallel="pipeline")
    assert np.array_equal(several[0], one[0]) and several[1:] == one[1:]


def test_layers_of_several_kinds_keep_theirs_in_every_stage(tmp_path):
    path = toy_gemma3(tmp_path / "toy.gguf", block_type="Q8_0")

    def logits(**options):
        with _load(path, resident="none", **options) as loaded:
            return np.asarray(loaded.logits(_IDS))

    assert np.array_equal(logits(), logits(devices=2, parallel="pipeline"))


def test_replicas_shuttle_their_caches(toy):
    def drawn(**options):
        with _load(toy, resident="none", kv_shuttle="on", **options) as loaded:
            return [token.id for token in loaded.generate(_IDS[:20], max_tokens=6, ignore_eos=True)]

    assert drawn(devices=2, parallel="replica") == drawn()


def test_replicas_have_pools_of_experts(tmp_path):
    path = toy_mixture(tmp_path / "experts.gguf", "qwen3moe")

    def drawn(**options):
        found = {}
        with _load(path, resident="dense", max_batch=1, **options) as loaded:
            for n, token in loaded.generate_batch([[3, 4], [5, 6]], max_tokens=3, ignore_eos=True):
                found.setdefault(n, []).append(token.id)
        return found

    assert drawn(devices=2, parallel="replica") == drawn()


def test_what_looks_inside_sees_the_same_through_stages(toy):
    vector = {3: np.linspace(-1, 1, 64, dtype=np.float32)}

    def seen(**options):
        with _load(toy, resident="none", **options) as loaded:
            width = loaded.model.config.d_model
            steer = {3: np.resize(vector[3], width)}
            captured = loaded.capture(_IDS[:9], hidden=(0, 3, 6), attention=(1, 5), steering=steer)
            lens = loaded.logit_lens(_IDS[:9], (2, 6))
            steered = [t.id for t in loaded.generate(_IDS[:9], max_tokens=3, ignore_eos=True, steering=steer)]
            session = loaded.session(_IDS[:9])
            resumed = [t.id for t in loaded.resume(session, max_tokens=3, ignore_eos=True)]
            fork = loaded.fork(session)
            resumed += [t.id for t in loaded.resume(fork, max_tokens=3, ignore_eos=True)]
            session.close()
            fork.close()
            return jax.tree.map(np.asarray, (captured, lens)), steered, resumed

    one, several = seen(), seen(devices=3, parallel="pipeline")
    assert jax.tree.all(jax.tree.map(np.array_equal, one, several))


def test_each_link_carries_its_stage_and_no_more(toy):
    with _load(toy, resident="none", devices=4, parallel="pipeline") as loaded:
        list(loaded.generate(_IDS[:9], max_tokens=4, ignore_eos=True))
        model, stats = loaded.model, loaded.stats
        spans = [span.nbytes for span in model.manifest.layers]
        for number, stage in enumerate(model.stages):
            own = sum(spans[layer] for layer in stage.layers)
            assert stats.links[number].bytes_streamed == stats.sweeps * own
            # What was fetched ahead of the next sweep is on its way too.
            assert stats.sweeps * own <= stage.weights.ring.bytes_put <= (stats.sweeps + 1) * own
        assert sum(len(stage.layers) for stage in model.stages) == model.config.n_layers
        assert sum(link.bytes_streamed for link in stats.links.values()) == stats.bytes_streamed
        counts = [len(stage.layers) for stage in model.stages]
        assert max(counts) == 2 and counts[-1] == 1  # the last device multiplies with the output matrix too


def test_a_stage_has_fewer_layers_where_the_rest_of_the_model_is(toy):
    with _load(toy, devices=2, parallel="pipeline") as loaded:
        model, parts = loaded.model, loaded.plan.parts
        assert set(model.tables) == {"token_embd.weight"}
        assert set(model.globals) == {"token_embd.weight", "output_norm.weight"}  # it makes the logits too
        assert [part.draws for part in parts] == [False, True]
        own = [
            sum(model.manifest.globals[name].nbytes for name in part)
            for part in (model.tables, model.globals)
        ]
        assert [part.globals_bytes for part in parts] == own and loaded.plan.globals_bytes == sum(own)
    # The second device has room for three of ten layers, and what is streamed costs most.
    runs = divide(10, 2, lambda start, stop: max(stop - start - (3 if stop == 10 else 5), 0) + stop / 1000)
    assert runs == [range(6), range(6, 10)]
    assert divide(10, 3, lambda start, stop: stop - start) == [range(3), range(3, 6), range(6, 10)]
    assert divide(4, 2, lambda start, stop: float("inf")) is None


def test_batches_are_in_different_stages_at_once(toy, monkeypatch):
    with _load(toy, resident="none", devices=2, parallel="pipeline", max_batch=1) as loaded:
        first, second = loaded.model.stages
        entered = {0: threading.Event(), 1: threading.Event()}
        take = type(loaded.model.weights).take

        def meeting(weights, layer, before=None):
            # One lane's first layer of the second stage waits for the other lane's first of the first stage.
            lane = int(threading.current_thread().name.rpartition("-")[2])
            if layer == first.layers.start:
                entered[lane].set()
            if layer == second.layers.start and lane == 0:
                assert entered[1].wait(30), "the other batch did not enter while this one was under way"
            return take(weights, layer, before)

        monkeypatch.setattr(type(loaded.model.weights), "take", meeting)
        assert len(list(loaded.generate_batch(_PROMPTS[:2], max_tokens=2, ignore_eos=True))) == 4


def test_what_a_batch_draws_from_is_not_behind_the_layers_of_another(toy, monkeypatch):
    with _load(toy, resident="all", devices=2, parallel="pipeline", max_batch=2) as loaded:
        model, given = loaded.model, []
        first, last = model.stages
        ids = np.zeros((1, 1), np.int32)
        assert embed(model, ids).devices() == {first.device}
        assert [x.devices() for x in at_stages(model, ids)] == [{first.device}, {last.device}]
        take, launch = type(model.weights).take, Draws.launch

        def taken(weights, layer, before=None):
            if layer == last.layers.start:
                given.append((threading.current_thread().name, "layers"))
            return take(weights, layer, before)

        def launched(draws, *args):
            given.append((threading.current_thread().name, "draws"))
            return launch(draws, *args)

        monkeypatch.setattr(type(model.weights), "take", taken)
        monkeypatch.setattr(Draws, "launch", launched)
        # Sweeps of one batch that follow each other would keep the other's waiting.
        monkeypatch.setattr(Scheduler, "_ahead", lambda scheduler, flight: pytest.fail("it goes ahead"))
        one_length = [prompt[:3] for prompt in (*_PROMPTS[:2], _IDS, _IDS[9:])]
        assert len(list(loaded.generate_batch(one_length, max_tokens=5, ignore_eos=True))) == 20
    assert len({name for name, _ in given}) == 2
    assert [what for _, what in given] == ["layers", "draws"] * (len(given) // 2)
    assert [name for name, _ in given[::2]] == [name for name, _ in given[1::2]]


@pytest.mark.parametrize("form", FORMS)
def test_layers_pass_in_pieces_where_they_do_not_fit_whole(toy, alone, monkeypatch, form):
    options = {"resident": "none", "devices": 2, "parallel": form, "stream_depth": 3}
    with _load(toy, max_batch=2, **options) as loaded:
        whole = loaded.plan
        assert not any(span.layout.pieces for span in loaded.model.manifest.layers)
    monkeypatch.setattr(decide, "piece_bytes", lambda backend: 20_000)
    logits, greedy, batch = _outputs(toy, **options, vram_budget_gib=(whole.peak_bytes - 1) / 2**30)
    assert np.array_equal(logits, alone[0]) and (greedy, batch) == alone[1:]
    with _load(toy, max_batch=2, **options, vram_budget_gib=(whole.peak_bytes - 1) / 2**30) as loaded:
        cut = [bool(span.layout.pieces) for span in loaded.model.manifest.layers]
        # In a pipeline the device with the output matrix has less room.
        assert cut == ([False] * 3 + [True] * 3 if form == "pipeline" else [True] * 6)
        assert loaded.plan.peak_bytes < whole.peak_bytes


def test_requests_are_spread_and_come_back_to_what_they_share(toy):
    with _load(toy, devices=2, parallel="replica", max_batch=2) as loaded:
        scheduler = loaded.scheduler(make_sampler(Settings()))

        def run(*prompts):
            numbers = [
                scheduler.submit(Order(tuple(ids), Settings(), 0, 0, 3, frozenset(), 0).request())
                for ids in prompts
            ]
            events = []
            while scheduler.busy:
                events += scheduler.step()
            return {number: [e for e in events if e.request == number] for number in numbers}

        try:
            other = [59 - token for token in _IDS]
            run(_IDS[:10], other[:100])
            assert [lane.stats.prompt_tokens for lane in scheduler.lanes] == [10, 100]
            # Both are idle, so a prompt goes where its beginning was.
            (events,) = run(other[:90]).values()
            assert [event.cached_tokens for event in events] == [64] * 3
            assert scheduler.stats.generated_tokens == 9 and scheduler.stats.prompt_tokens == 200
            number = scheduler.submit(Order(tuple(_IDS[:5]), Settings(), 0, 0, 100, frozenset(), 0).request())
            scheduler.step()
            scheduler.cancel(number)
            assert not scheduler.busy and scheduler.step() == []
            with pytest.raises(ValueError, match="the prompt is empty"):
                scheduler.submit(Order((), Settings(), 0, 0, 1, frozenset(), 0).request())
        finally:
            scheduler.close()


@pytest.mark.parametrize("form", FORMS)
def test_a_failing_ring_leaves_an_engine_that_goes_on_and_closes(toy, alone, monkeypatch, form):
    with _load(toy, resident="none", devices=2, parallel=form, max_batch=2) as loaded:
        ring = loaded.model.stages[1].weights.ring if form == "pipeline" else loaded.model.weights.ring
        put, left = ring._source.put, [OSError("the link is gone")]

        def failing(item):
            if left and item == ring._items[1]:
                raise left.pop()
            return put(item)

        monkeypatch.setattr(ring._source, "put", failing)
        with pytest.raises(OSError, match="the link is gone"):
            loaded.logits(_IDS)
        assert np.array_equal(np.asarray(loaded.logits(_IDS)), alone[0])
        left.append(OSError("the link is gone"))
        with pytest.raises(RuntimeError, match="the link is gone"):
            list(loaded.generate_batch(_PROMPTS, max_tokens=2, ignore_eos=True))
        assert len(list(loaded.generate_batch(_PROMPTS, max_tokens=2, ignore_eos=True))) == 8
        left.append(OSError("the link is gone"))


def test_turns_come_in_the_order_of_asking():
    turns = Turns()
    first, second, third = turns.ask(), turns.ask(), turns.ask()
    assert first.is_set() and not second.is_set()
    turns.leave(second)  # gave up
    assert not third.is_set()
    turns.leave(first)
    assert third.is_set()


def test_a_trace_has_lanes_of_each_device(toy, tmp_path):
    for form, lanes in (
        ("pipeline", {"link 0", "link 1", "compute 0", "compute 1"}),
        ("replica", {"link 0", "compute 0"}),
    ):
        with _load(toy, resident="none", devices=2, parallel=form, trace=True) as loaded:
            loaded.logits(_IDS[:9])
            loaded.timeline.save(tmp_path / "trace.json")
        rows = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
        names = {row["tid"]: row["args"]["name"] for row in rows if row["ph"] == "M"}
        assert {names[row["tid"]] for row in rows if row["ph"] == "X"} == lanes


@pytest.mark.parametrize("form", FORMS)
def test_a_server_spreads_requests_and_says_how(toy, form):
    body = {"prompt": "hello", "max_tokens": 5, "temperature": 0.9, "seed": 3}
    with serve_toy(toy) as one:
        text = one.post("/v1/completions", json=body).json()["choices"][0]["text"]
    with serve_toy(toy, load={"resident": "none", "devices": 2, "parallel": form}) as client:
        answers = [client.post("/v1/completions", json={**body, "n": 4}).json() for _ in range(2)]
        assert answers[0]["choices"] == answers[1]["choices"]
        assert answers[0]["choices"][0]["text"] == text
        health = client.get("/health").json()
        assert health["parallel"] == form and health["devices"] == 2
        assert health["batches"] == [{"running": 0, "waiting": 0}] * 2
        metrics = client.get("/metrics").text
        for number in (0, 1):
            assert f'airjax_lane_running{{lane="{number}"}} 0.0' in metrics
            found = re.search(rf'link_streamed_bytes_total{{device="{number}"}} (\S+)', metrics)
            assert float(found[1]) > 0


def test_a_warm_server_has_programs_on_every_device(toy):
    stages = []
    with _load(toy, devices=2, parallel="replica", max_batch=1) as loaded:
        warm_up(loaded, full=False, tell=stages.append, batches=[Batch(1, 1, 2)])
    assert stages == ["compiling, 1 of 1 on device 0", "compiling, 1 of 1 on device 1"]


@pytest.mark.parametrize(
    ("options", "form", "reason"),
    [
        ({"devices": 2, "max_batch": 2}, "replica", "one device holds the whole model"),
        ({"devices": 2}, "tensor", "each device reads its part of every layer"),
        ({"devices": 2, "resident": "none"}, "tensor", "not probed"),
        (
            {"devices": 2, "resident": "none", "links": Links((5e10, 5e10), 9.5e10)},
            "tensor",
            "1.90 times as fast",
        ),
        (
            {"devices": 2, "resident": "none", "links": Links((5e10, 5e10), 5.2e10)},
            "pipeline",
            "only 1.04 times",
        ),
        ({"devices": 3, "resident": "none"}, "pipeline", "can't be divided among 3 devices"),
        ({"devices": 3, "resident": "none", "draft": "lookup"}, "replica", "can't be cut"),
    ],
)
def test_auto_chooses_by_the_law_and_says_why(toy, options, form, reason):
    with _load(toy, **options) as loaded:
        plan = loaded.plan
    assert plan.parallel == form
    assert reason in plan.parallel_reason
    table = format_plan(plan)
    assert f"{options['devices']} devices" in table and plan.parallel_reason in table
    assert ("device 1" in table) == (form == "pipeline")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"parallel": "pipeline", "kv_shuttle": "on"}, "pass --kv_shuttle=off or --parallel=replica"),
        ({"parallel": "pipeline", "draft": "lookup"}, "pass --draft=none or --parallel=replica"),
        ({"parallel": "both"}, "parallel must be one of auto, tensor, pipeline, replica"),
        ({"parallel": "pipeline", "vram_budget_gib": 1e-3}, "GiB of device memory but the budget is"),
        ({"parallel": "pipeline", "context": 10**9}, "context must be between"),
    ],
)
def test_what_cannot_work_is_refused(toy, options, words):
    with pytest.raises((PlanError, airjax.RequestError), match=words):
        _load(toy, devices=2, **options)


def test_more_devices_than_layers_are_refused(tmp_path):
    path = toy_llama(tmp_path / "toy.gguf", layers=2)
    with pytest.raises(PlanError, match="2 layers can't be divided among 3 devices: pass --devices=2"):
        _load(path, devices=3, parallel="pipeline")


def test_a_pipeline_of_experts_is_refused_where_they_would_be_streamed(tmp_path):
    path = toy_mixture(tmp_path / "experts.gguf", "qwen3moe")
    with pytest.raises(PlanError, match="pass --parallel=replica"):
        _load(path, devices=2, parallel="pipeline", resident="dense")


def test_layers_that_share_a_cache_stay_on_one_device(tmp_path):
    path = toy_gemma4(tmp_path / "toy.gguf", own_values=True, per_layer=16, shared=2, layers=4)
    with pytest.raises(
        PlanError, match="read the KV cache of others are on one device: pass --parallel=replica"
    ):
        _load(path, devices=2, parallel="pipeline")
    with _load(path, devices=2, resident="none", max_batch=2) as loaded:
        assert loaded.plan.parallel == "replica"
    one, several = _outputs(path, resident="none"), _outputs(path, resident="none", devices=2)
    assert np.array_equal(one[0], several[0]) and one[1:] == several[1:]


def test_an_embedding_for_each_layer_passes_through_the_stages(tmp_path):
    path = toy_gemma4(tmp_path / "toy.gguf", own_values=True, per_layer=16, layers=4)
    one = _outputs(path, prefill_chunk=64)
    several = _outputs(path, prefill_chunk=64, devices=2, parallel="pipeline")
    assert np.array_equal(one[0], several[0]) and one[1:] == several[1:]


def test_a_plan_without_devices_is_as_it_was(toy):
    with _load(toy) as loaded:
        fields = dataclasses.asdict(loaded.plan)
    assert (fields["devices"], fields["parallel"], fields["parts"]) == (1, "", ())
