"""Streaming by the expert: the numbers never depend on the pool, and little more crosses the link than was chosen."""

import contextlib
import io
from unittest import mock

import jax
import numpy as np
import pytest
from toy_experts import random_ids, toy_mixture
from toy_gemma4 import toy_gemma4
from toy_models import toy_llama

import airjax
from airjax import engine, models, sampling
from airjax.bench.compilations import compilations
from airjax.commands.meter import report
from airjax.engine import drafting, generation
from airjax.engine.workspace import compiled_workspace
from airjax.gguf import build_manifest, open_gguf
from airjax.plan import PlanError, make_plan

_EXPERTS, _USED, _LAYERS = 16, 3, 4
_RAM = 1 << 34


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return toy_mixture(
        tmp_path_factory.mktemp("experts") / "toy.gguf",
        "qwen3moe",
        block_type="Q4_0",
        layers=_LAYERS,
        count=_EXPERTS,
        used=_USED,
    )


@contextlib.contextmanager
def _planner(path):
    """Gives the plan for a budget and options, by expert where nothing else is said."""
    with open_gguf(path) as file:
        _, config = models.from_gguf(file, "float32")
        manifest = build_manifest(file)

        def plan(budget, **options):
            defaults = {"backend": "cpu", "ram_budget_bytes": _RAM, "context": 256, "resident": "dense"}
            return make_plan(file, manifest, config, vram_budget_bytes=budget, **defaults | options)

        yield plan


def _budget(path, slots, **options):
    """The device memory with which the pool has so many slots."""
    with _planner(path) as plan:

        def planned(budget):
            try:
                return sum(plan(budget, **options).expert_slots)
            except PlanError:
                return 0

        low, high = 0, 1 << 31
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if planned(middle) >= slots else (middle, high)
        assert planned(high) == slots
        return high


def _fetched_by(who):
    """Experts are fetched by the host although the device could."""
    if who == "device":
        return contextlib.nullcontext()
    return mock.patch("airjax.plan.experts._fetchable", return_value=False)


def _load(path, slots=None, max_batch=None, by="host", **options):
    with _fetched_by(by):
        budget = 1 << 31 if slots is None else _budget(path, slots, max_batch=max_batch)
        if slots is not None:
            options["resident"] = "dense"
        loaded = airjax.load(
            path,
            vram_budget_gib=budget / 2**30,
            ram_budget_gib=options.pop("ram_budget_gib", 16),
            context=256,
            compute_dtype="float32",
            max_batch=max_batch,
            **options,
        )
    if slots is not None:
        assert loaded.plan.device_fetch == loaded.model.pool.on_device == (by == "device")
    return loaded


def _results(loaded, count=150, tokens=12):
    ids = random_ids(loaded.model.config.vocab_size, count)
    logits = loaded.logits(ids)
    draws = loaded.generate(ids[:11], max_tokens=tokens, key=jax.random.key(1), ignore_eos=True)
    return logits, [(token.id, token.logprob) for token in draws]


@pytest.fixture(scope="module")
def resident(path):
    with _load(path, resident="all") as loaded:
        assert loaded.model.pool is None
        return _results(loaded)


@pytest.mark.parametrize(
    ("by", "slots"),
    [("host", _USED), ("host", _EXPERTS * _LAYERS), ("device", _EXPERTS), ("device", 20)],
)
def test_a_pool_of_any_size_gives_the_numbers_of_resident_layers(path, resident, by, slots):
    with _load(path, slots, by=by) as loaded:
        logits, tokens = _results(loaded)
        np.testing.assert_array_equal(logits, resident[0])
        assert tokens == resident[1]
        # What is in the pool now makes no difference either.
        np.testing.assert_array_equal(_results(loaded)[0], resident[0])


@pytest.mark.parametrize(
    ("model", "block_type", "by"),
    [
        ("gpt-oss", "MXFP4", "device"),
        ("glm4moe", "Q4_0", "device"),
        ("qwen2moe", "Q4_0", "host"),
        ("deepseek2", "Q8_0", "host"),
    ],
)
def test_biases_sinks_windows_and_dense_layers_come_through_the_pool_too(tmp_path, model, block_type, by):
    toy = toy_mixture(tmp_path / "toy.gguf", model, block_type=block_type, layers=3)
    with _load(toy, resident="all") as loaded:
        expected = _results(loaded)
    with _load(toy, 5 if by == "host" else 9, by=by) as loaded:
        logits, tokens = _results(loaded)
        np.testing.assert_array_equal(logits, expected[0])
        assert tokens == expected[1]


@pytest.mark.parametrize(
    ("model", "by"),
    [
        ("dbrx", "host"),
        ("llama4", "device"),
        ("gemma4", "host"),
        ("smallthinker", "host"),
        ("arctic", "device"),
        ("grok-2", "host"),
        ("grok-2", "device"),
    ],
)
def test_weighted_inputs_own_routers_and_norms_behind_experts_come_through_the_pool_too(tmp_path, model, by):
    if model == "gemma4":
        toy = toy_gemma4(tmp_path / "toy.gguf", experts=True, block_type="Q4_0", layers=2)
    else:
        layers = 4 if model == "llama4" else 2  # of which two are mixtures
        toy = toy_mixture(tmp_path / "toy.gguf", model, block_type="Q4_0", layers=layers)
    with _load(toy, resident="all") as loaded:
        expected = _results(loaded, count=20, tokens=3)
    with _load(toy, 5 if by == "host" else 9, by=by) as loaded:
        logits, tokens = _results(loaded, count=20, tokens=3)
        np.testing.assert_array_equal(logits, expected[0])
        assert tokens == expected[1]


@pytest.mark.parametrize("tier", ["ring", "pageable mapping"])
def test_tiers_give_the_same_numbers(path, resident, tier):
    with _load(path, 20, tier=tier) as loaded:
        assert loaded.plan.tier == tier
        logits, tokens = _results(loaded)
        np.testing.assert_array_equal(logits, resident[0])
        assert tokens == resident[1]


def test_a_file_beyond_the_ram_budget_is_read_expert_by_expert(path):
    with _fetched_by("host"), open_gguf(path) as file:
        _, config = models.from_gguf(file, "float32")
        planned = make_plan(
            file,
            build_manifest(file),
            config,
            backend="cpu",
            vram_budget_bytes=_budget(path, 20),
            ram_budget_bytes=100_000,
            context=256,
            resident="dense",
        )
    assert planned.tier == "ring" and planned.expert_slots == (20,)
    assert planned.host_slots * planned.host_slot_bytes <= 100_000


def _decode_bytes(loaded, count, seed):
    ids = random_ids(loaded.model.config.vocab_size, 5, seed)
    list(loaded.generate(ids, max_tokens=count, ignore_eos=True))
    return loaded.stats


@pytest.mark.parametrize(("by", "slots"), [("host", _USED), ("host", 40), ("device", 20)])
def test_little_more_crosses_the_link_than_was_chosen_and_not_there(path, by, slots):
    with _load(path, slots, by=by) as loaded:
        (unit_bytes,) = {span.unit_bytes for span in loaded.model.experts}
        needed = moved = 0
        for seed in range(4):
            stats = _decode_bytes(loaded, 12, seed)
            experts = stats.experts
            missed = experts.misses * unit_bytes + experts.prefetch_used_bytes
            assert experts.demand_bytes == experts.misses * unit_bytes
            assert experts.bytes == stats.bytes_streamed
            needed, moved = needed + missed, moved + experts.bytes
        assert 0 < needed <= moved <= 1.1 * needed
        assert stats.sweeps == 12
        if by == "host":
            assert 0 < experts.predicted_right <= experts.predicted


def test_how_many_experts_are_missing_compiles_nothing(path):
    with _load(path, 20, by="device") as loaded:
        _decode_bytes(loaded, 8, 0)
        before = compilations()
        misses = {_decode_bytes(loaded, 8, seed).experts.misses for seed in range(1, 6)}
        assert len(misses) > 1 and compilations() == before


def test_the_next_sweep_is_dispatched_before_its_token_is_read(path, monkeypatch):
    order = []
    with _load(path, 20, by="device") as loaded:
        assert loaded.model.runs_ahead
        sweep, read = generation.sweep, jax.device_get
        monkeypatch.setattr(
            generation, "sweep", lambda *args, **more: order.append("sweep") or sweep(*args, **more)
        )
        monkeypatch.setattr(jax, "device_get", lambda tree: order.append("read") or read(tree))
        stats = _decode_bytes(loaded, 4, 0)
    assert order == ["sweep", *["sweep", "read"] * 3, "read"]
    assert stats.sweeps == 4 and stats.experts.misses > 0


def test_a_trace_shows_what_was_fetched(path):
    with _load(path, 20, by="device", trace=True) as loaded:
        stats = _decode_bytes(loaded, 3, 0)
        events = loaded.timeline.events()
    assert sum(event.nbytes for event in events if event.lane == "host to device") == stats.experts.bytes > 0
    assert len({event.name for event in events if event.lane == "compute"}) == _LAYERS


@pytest.mark.parametrize("by", ["host", "device"])
def test_a_pool_of_everything_fetches_each_expert_once(path, by):
    with _load(path, _EXPERTS * _LAYERS, by=by) as loaded:
        ids = random_ids(loaded.model.config.vocab_size, 200)
        loaded.logits(ids)
        first = loaded.stats.experts
        assert first.misses > 0 and first.prefetch_wasted_bytes <= 0.1 * first.bytes
        loaded.logits(ids)
        second = loaded.stats.experts
        assert second.bytes == 0 and second.hit_rate == 1


def _batch(loaded, prompts):
    scheduler = engine.Scheduler(loaded.model, sampler=airjax.sampling.greedy())
    numbers = [
        scheduler.submit(
            engine.Request(tuple(ids), airjax.sampling.greedy(), jax.random.key(0), 8, frozenset())
        )
        for ids in prompts
    ]
    out = {number: [] for number in numbers}
    while scheduler.busy:
        for event in scheduler.step():
            assert not event.error
            out[event.request].append((event.token, event.logprob))
    stats = scheduler.stats
    scheduler.close()
    return list(out.values()), stats


def test_a_batch_gives_the_numbers_of_resident_layers_and_shares_experts(path):
    prompts = [random_ids(100, 4 + 17 * n, n) for n in range(5)]
    with _load(path, resident="all", max_batch=5) as loaded:
        expected, _ = _batch(loaded, prompts)
    for by, slots in (("host", 5), ("device", 20)):
        with _load(path, slots, max_batch=5, by=by) as loaded:
            drawn, stats = _batch(loaded, prompts)
            assert drawn == expected
            # An expert that several tokens of a sweep chose counts and travels once.
            assert stats.experts.hits + stats.experts.misses <= stats.sweeps * _LAYERS * _EXPERTS
            assert stats.bytes_streamed == stats.experts.bytes > 0


def test_the_meter_reports_experts(path):
    out = io.StringIO()
    with _load(path, 12) as loaded:
        stats = _decode_bytes(loaded, 4, 0)
        report(stats, out)
    hits = f"experts: {100 * stats.experts.hit_rate:.1f} % of the needed ones were there"
    assert hits in out.getvalue() and "GB in vain" in out.getvalue()


def test_a_generation_left_in_the_middle_leaves_the_pool_usable(path, resident):
    with _load(path, 20, by="device") as loaded:
        draws = loaded.generate(random_ids(100, 9), max_tokens=20, ignore_eos=True)
        next(draws)
        draws.close()
        np.testing.assert_array_equal(_results(loaded)[0], resident[0])


def test_dense_is_refused_where_it_makes_no_sense(path, tmp_path):
    with pytest.raises(PlanError, match=r"all but the experts does not fit in 0\.10 GiB"):
        airjax.load(path, vram_budget_gib=0.1, context=256, resident="dense", compute_dtype="float32")
    toy = toy_llama(tmp_path / "toy.gguf")
    with pytest.raises(PlanError, match="resident=dense is for mixtures of experts"):
        airjax.load(toy, vram_budget_gib=1, context=256, resident="dense")


@pytest.mark.parametrize("by", ["host", "device"])
def test_the_workspace_by_the_compiler_is_less_than_was_planned(path, by):
    with _load(path, 20, prefill_chunk=64, by=by) as loaded:
        model = loaded.model
        compiled = compiled_workspace(model.manifest, model.config, model.plan, model.experts)
        assert 64 * _USED * model.config.d_model * 4 < compiled < model.plan.workspace_bytes


def test_a_checked_draft_gives_the_draws_of_plain_decoding(path):
    options = {"max_tokens": 16, "stop_ids": frozenset(), "key": jax.random.key(1)}
    options["sampler"] = sampling.temperature(0.3)
    prompt = [5, 6, 7, 8] * 4
    with _load(path, 20, by="device") as loaded:
        expected = _draws(loaded, engine.generate, prompt, **options)
        drafter = drafting.Lookup()
        drafter.push([*prompt, *(draw.id for draw in expected[:6]), 9, 9])
        more = {"drafter": drafter, "draft_max": 3}
        assert _draws(loaded, drafting.generate_drafted, prompt, **options, **more) == expected
        assert 0 < loaded.stats.accepted_tokens < loaded.stats.drafted_tokens


def _draws(loaded, generate, prompt, **options):
    loaded.model.stats = engine.Stats()
    state = engine.new_state(loaded.model)
    draws = list(generate(loaded.model, state, prompt, **options))
    loaded.model.wait()
    state.close()
    return draws


def test_long_prompts_share_a_sweep_where_that_costs_few_slots(path):
    # Where the host calls products, those of one layer are at work beside the attention of the next one.
    batch, host = {"max_batch": 8}, {"device_fetch": False}
    small = _budget(path, 40, **batch, **host)
    with _planner(path) as plan:
        assert plan(small, **batch, **host).prefill_chunk == 512
        assert plan(small, **batch).prefill_chunk == 2048
        # Where all experts have a slot, more tokens take none of them.
        large = plan(1 << 30, **batch)
        assert (large.prefill_chunk, sum(large.expert_slots)) == (2048, _EXPERTS * _LAYERS)
        assert plan(1 << 30, max_batch=4).prefill_chunk == 1024
        assert plan(1 << 30).prefill_chunk == 512  # no prompt is longer than its context
        assert plan(1 << 30, prefill_chunk=64, **batch).prefill_chunk == 64
        assert plan(1 << 30, resident="all", **batch).prefill_chunk == 512
