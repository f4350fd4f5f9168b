"""Checks of layers that are cut among devices, for a process that has eight of them; see test_tensor.py."""

import re

import cpu_kernel
import jax
import numpy as np
import pytest
from toy_experts import toy_mixture
from toy_models import toy_decoder, toy_gemma3, toy_llama

import airjax
from airjax import engine, plan, sampling
from airjax.engine import drafting
from airjax.engine.drafting import rows
from airjax.engine.drafting.law import Law
from airjax.engine.drafting.smaller import ResidentLayers
from airjax.engine.step import block_step
from airjax.engine.sweep import grown
from airjax.plan import GIB, PlanError

# The sums over the devices add in another order.
_TOLERANCE = 2e-5
_TOYS = {
    "plain": lambda path: toy_llama(path),
    "Q8_0": lambda path: toy_llama(path, block_type="Q8_0"),
    "Q4_0": lambda path: toy_llama(path, block_type="Q4_0"),
    "Q4_K": lambda path: toy_llama(path, block_type="Q4_K", head_width=128),
    "Q6_K": lambda path: toy_llama(path, block_type="Q6_K", head_width=128),
    "biases": lambda path: toy_llama(path, attention_biases=True, mlp_biases=True),
    "sliding window": lambda path: toy_gemma3(path, block_type="Q8_0"),
    "fused": lambda path: toy_decoder(path, "phi3"),
    "norms of each head": lambda path: toy_decoder(path, "command-r"),
    "fused, with biases": lambda path: toy_decoder(path, "gptneox"),
    "no gate": lambda path: toy_decoder(path, "starcoder2"),
    "numbers of the metadata": lambda path: toy_decoder(path, "apertus"),
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return toy_llama(tmp_path_factory.mktemp("toys") / "toy.gguf", kv_heads=4)


def _load(path, **options):
    form = {"parallel": "tensor"} if options.get("devices", 1) != 1 else {}
    return airjax.load(path, **{"vram_budget_gib": 1, "context": 128, **form, **options})


def _logits(path, **options):
    with _load(path, **options) as loaded:
        ids = np.random.default_rng(0).integers(0, loaded.model.config.vocab_size, 100).tolist()
        return np.asarray(loaded.logits(ids))


@pytest.mark.parametrize("name", _TOYS)
def test_two_devices_give_the_logits_of_one(tmp_path, name):
    path = _TOYS[name](tmp_path / "toy.gguf")
    alone = _logits(path)
    streamed, resident = (_logits(path, devices=2, resident=kept) for kept in ("none", "all"))
    assert np.array_equal(streamed, resident)
    assert np.abs(streamed - alone).max() < _TOLERANCE * np.abs(alone).max()


@pytest.mark.parametrize("count", [2, 4, 8])
def test_more_devices_and_every_depth_give_the_same(tmp_path, count):
    path = toy_llama(tmp_path / "toy.gguf", kv_heads=8, heads=8)
    alone = _logits(path)
    several = [_logits(path, devices=count, resident="none", stream_depth=depth) for depth in (1, 3)]
    assert np.array_equal(*several)
    assert np.abs(several[0] - alone).max() < _TOLERANCE * np.abs(alone).max()


def test_each_device_is_sent_its_share(toy):
    whole = _load(toy, resident="none")
    with whole, _load(toy, resident="none", devices=4) as loaded:
        model = loaded.model
        loaded.logits([1, 2, 3])
        source = model.weights.ring._source
        sweeps = source.bytes_put[0] / model.plan.bytes_per_sweep
        # What was fetched ahead of the next sweep counts too.
        assert 1 <= sweeps <= 2 and len(set(source.bytes_put)) == 1
        matrices = sum(
            slot.nbytes for _, slot in whole.model.manifest.layers[0].layout.tensors if len(slot.shape) > 1
        )
        norms = 2 * 4 * model.config.d_model
        used = sum(slot.nbytes for _, slot in model.manifest.layers[0].layout.tensors)
        assert used == matrices // 4 + norms
        assert model.stats.bytes_streamed == 4 * model.plan.bytes_per_sweep


def test_a_block_sums_twice_and_gathers_no_weights(toy):
    with _load(toy, devices=4, resident="all") as loaded:
        model = loaded.model
        step = block_step(model.manifest.layers[0].layout, model.config, model.kinds[0], 128)
        state = engine.new_state(model)
        try:
            x = jax.device_put(np.zeros((1, 1, model.config.d_model), np.float32), model.everywhere)
            positions = jax.device_put(np.zeros((1, 1), np.int32), model.everywhere)
            lowered = step.lower(model.weights.take(0), x, grown(state.kv[0], 128), positions)
            text = lowered.compile().as_text()
        finally:
            state.close()
    assert len(re.findall(r" all-reduce(?:-start)?\(", text)) == 2
    assert not re.findall(r"all-gather|all-to-all|collective-permute", text)


@pytest.mark.parametrize("block", [0, 64])
def test_behind_the_shuttle_each_device_has_its_heads(tmp_path, monkeypatch, block):
    """Of a cache in one piece bit for bit; of one in pieces of 64 positions to the rounding of its sums."""
    path = toy_gemma3(tmp_path / "toy.gguf", block_type="Q8_0")
    ids = np.random.default_rng(0).integers(0, 60, 200).tolist()

    def run(**options):
        with _load(path, devices=2, context=256, prefill_chunk=64, **options) as loaded:
            logits = np.asarray(loaded.logits(ids))
            tokens = [token.id for token in loaded.generate(ids, max_tokens=6, ignore_eos=True)]
            assert loaded.plan.shuttle == (options["kv_shuttle"] == "on")
            return logits, tokens

    expected, tokens = run(kv_shuttle="off")
    if block:
        monkeypatch.setattr(plan.limits, "KV_BLOCK_BYTES", 1)  # the least: one page
    got, shuttled = run(kv_shuttle="on", resident="none")
    assert np.array_equal(got, expected) or (block and np.abs(got - expected).max() < 1e-4)
    assert shuttled == tokens


def test_a_session_goes_on_with_other_devices(tmp_path):
    """Two KV heads on four devices: each is there twice, and once in the file."""
    path = toy_llama(tmp_path / "toy.gguf", kv_heads=2)
    ids = list(range(3, 40))
    with _load(path, devices=4, kv_shuttle="on") as loaded:
        session = loaded.session(ids)
        begun = [token.id for token in loaded.resume(session, max_tokens=4, ignore_eos=True)]
        loaded.save(session, tmp_path / "session")
        session.state.close()
    for options in ({}, {"devices": 4}, {"devices": 2, "kv_shuttle": "on"}):
        with _load(path, **options) as loaded:
            session = loaded.restore(tmp_path / "session")
            more = [token.id for token in loaded.resume(session, max_tokens=4, ignore_eos=True)]
            session.state.close()
            assert begun + more == [t.id for t in loaded.generate(ids, max_tokens=8, ignore_eos=True)]


def test_attention_that_is_looked_at_has_all_heads(toy):
    def seen(**options):
        with _load(toy, **options) as loaded:
            return loaded.capture(range(3, 20), attention=(1,)).attention[1]

    assert np.abs(seen(devices=2) - seen()).max() < 1e-5


class _Oracle:
    """Knows the text, and is wrong in every second draft."""

    name, token_s, asked = "oracle", 0.0, 0

    def __init__(self, text):
        self.text = text

    def push(self, tokens):
        pass

    def propose(self, sequel, after, most, go_on):
        self.asked += 1
        at = len(sequel.ids) + len(after)
        tokens = [t ^ (self.asked % 2 and n == 2) for n, t in enumerate(self.text[at : at + most])]
        return drafting.Draft(tuple(tokens), ("oracle",) * len(tokens))

    def close(self):
        pass


@pytest.mark.parametrize("way", ["streamed", "shuttled", "rows in one call", "by resident layers"])
def test_drafts_change_no_token(tmp_path, monkeypatch, way):
    path = toy_llama(tmp_path / "toy.gguf", kv_heads=4, layers=4)
    ids, sampler = [5, 6, 7, 8, 9] * 6, sampling.temperature(0.9)
    options = {"resident": "none"} | ({"kv_shuttle": "on"} if way == "shuttled" else {})
    if way == "by resident layers":
        with _load(path, devices=2, stream_depth=1, **options) as loaded:
            room = loaded.plan.peak_bytes + 2 * loaded.model.manifest.layers[0].nbytes
        options = {"vram_budget_gib": room / GIB, "stream_depth": 1}
    if way == "rows in one call":
        monkeypatch.setattr(rows, "exact", lambda model: False)
    with _load(path, devices=2, **options) as loaded:
        expected = [t.id for t in loaded.generate(ids, sampler=sampler, max_tokens=20, ignore_eos=True)]
        model, state = loaded.model, engine.new_state(loaded.model)
        model.stats = engine.Stats()
        drafter = _Oracle([*ids, *expected])
        if way == "by resident layers":
            assert model.plan.resident and model.plan.streamed
            drafter = ResidentLayers(model, state, sampler)
        draws = drafting.generate_drafted(
            model,
            state,
            ids,
            drafter=drafter,
            draft_max=5,
            sampler=sampler,
            key=jax.random.key(0),
            max_tokens=20,
            stop_ids=frozenset(),
        )
        assert [draw.id for draw in draws] == expected
        assert model.stats.accepted_tokens and model.stats.decode_sweeps < 20
        model.wait()
        state.close()


def test_a_draft_model_guesses_beside(tmp_path, monkeypatch):
    path, small = toy_llama(tmp_path / "a.gguf", kv_heads=4), toy_llama(tmp_path / "b.gguf", layers=1)

    def drawn(**options):
        with _load(path, devices=2, **options) as loaded:
            out = loaded.generate(
                range(3, 30), sampler=sampling.temperature(0.7), max_tokens=12, ignore_eos=True
            )
            return [token.id for token in out], loaded.stats.drafted_tokens

    monkeypatch.setattr(Law, "ask", lambda self, most: most)  # whatever it costs
    monkeypatch.setattr(
        Law, "keep", lambda self, draft, most: draft.only(range(min(len(draft.tokens), most)))
    )
    tokens, drafted = drawn(draft=small)
    assert drafted and tokens == drawn()[0]


def test_a_batch_gives_what_each_gives_alone(toy):
    prompts = [
        np.random.default_rng(n).integers(0, 60, size).tolist() for n, size in enumerate((3, 70, 1, 20))
    ]
    sampler = sampling.temperature(0.8)

    def drawn(**options):
        found = {}
        with _load(toy, max_batch=4, **options) as loaded:
            for n, token in loaded.generate_batch(prompts, samplers=sampler, max_tokens=12, ignore_eos=True):
                found.setdefault(n, []).append(token.id)
        return found

    alone = drawn()
    assert drawn(devices=4, resident="none") == drawn(devices=2, resident="all") == alone


def test_resident_layers_of_each_device_are_relaid(tmp_path, monkeypatch):
    path = toy_llama(tmp_path / "toy.gguf", block_type="Q4_K", head_width=128, separate_output=True)
    alone = _logits(path)
    cpu_kernel.install(monkeypatch)
    with _load(path, devices=2, resident="all") as loaded:
        model = loaded.model
        assert model.plan.relaid and all(
            model.weights.relaid(layer) for layer in range(model.config.n_layers)
        )
        (output,) = jax.tree.leaves(model.globals["output.weight"])
        assert output.sharding.shard_shape(output.shape)[0] * 2 == len(output)
        ids = np.random.default_rng(0).integers(0, model.config.vocab_size, 100).tolist()
        got = np.asarray(loaded.logits(ids))
        tokens = [token.id for token in loaded.generate(ids[:9], max_tokens=8, ignore_eos=True)]
    assert np.abs(got - alone).max() < 1e-4 * np.abs(alone).max()
    with _load(path, resident="all") as loaded:
        assert [token.id for token in loaded.generate(ids[:9], max_tokens=8, ignore_eos=True)] == tokens


@pytest.mark.parametrize(("name", "count", "counts"), [("smollm2", 3, "1, 3"), ("gemma3", 4, "1, 2, 4")])
def test_a_real_model_writes_the_same(request, name, count, counts):
    """SmolLM2 has 9 heads and 3 KV heads, Gemma 3 has 4 heads and 1 KV head, which four devices share."""
    path = request.getfixturevalue(name)

    def text(**options):
        with airjax.load(path, vram_budget_gib=2, context=256, **options) as loaded:
            ids = loaded.tokenizer.encode("The capital of France is")
            return [token.id for token in loaded.generate(ids, max_tokens=12)]

    assert text(devices=count, resident="none") == text()
    with pytest.raises(PlanError, match=f"--devices may be {counts}$"):
        _load(path, devices=8)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"devices": 3}, "--devices may be 1, 2, 4$"),
        ({"devices": 9}, "between 1 and 8"),
        ({"devices": 0}, "between 1 and 8"),
        ({"devices": 2, "tier": "ring"}, "a tier of the mapping"),
        (
            {"devices": 2, "ram_budget_gib": 1e-4, "resident": "none"},
            "pass a larger --ram_budget_gib or --devices=1",
        ),
    ],
)
def test_what_cannot_work_is_refused(toy, options, words):
    with pytest.raises((PlanError, airjax.RequestError), match=words):
        _load(toy, **options)


def test_experts_and_norms_over_all_heads_are_refused(tmp_path):
    for path in (
        toy_decoder(tmp_path / "norm.gguf", "olmo2"),
        toy_mixture(tmp_path / "experts.gguf", "qwen3moe"),
    ):
        with pytest.raises(PlanError, match="can't be cut among devices yet"):
            _load(path, devices=2)
