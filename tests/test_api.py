"""The front: what a request gives, and how a bad one is refused."""

import os
import shutil

import jax
import numpy as np
import pytest
from toy_models import toy_llama

import airjax
from airjax import sampling
from airjax.api import RequestError
from airjax.gguf import GGUFError
from airjax.plan import PlanError


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return toy_llama(tmp_path_factory.mktemp("toy") / "toy.gguf")


@pytest.fixture(scope="module")
def engine(path):
    with airjax.load(path, vram_budget_gib=1, context=128) as engine:
        yield engine


def _text(engine, ids, **options):
    return "".join(token.text for token in engine.generate(ids, **options))


def test_the_same_key_gives_the_same_tokens_and_another_key_others(engine):
    def run(seed):
        sampler = sampling.temperature(2.0)
        return [
            t.id for t in engine.generate([1, 2], sampler=sampler, key=jax.random.key(seed), max_tokens=20)
        ]

    assert run(1) == run(1) != run(2)


def test_no_sampler_is_greedy(engine):
    ids = list(range(10))
    token = next(engine.generate(ids, max_tokens=1, ignore_eos=True))
    logits = engine.logits(ids)[-1].astype(np.float64)
    assert token.id == logits.argmax()
    assert token.logprob == pytest.approx(logits.max() - np.log(np.exp(logits).sum()), abs=1e-2)


def test_texts_join_to_the_decoded_tokens(engine):
    tokens = list(engine.generate([5, 6], max_tokens=40, ignore_eos=True, sampler=sampling.temperature(3.0)))
    whole = engine.tokenizer.decode([token.id for token in tokens], skip_special=True)
    assert "".join(token.text for token in tokens) == whole


def test_a_stop_string_ends_the_text_before_it(engine):
    options = {"max_tokens": 40, "ignore_eos": True, "sampler": sampling.temperature(3.0)}
    whole = _text(engine, [5, 6], **options)
    stop = whole[len(whole) // 2 :][:3]
    assert _text(engine, [5, 6], stop=[stop], **options) == whole[: whole.index(stop)]
    assert engine.stats.finish_reason == "stop"


def test_what_might_have_begun_a_stop_string_is_given_out_at_the_end(engine):
    options = {"max_tokens": 20, "ignore_eos": True, "sampler": sampling.temperature(3.0)}
    whole = _text(engine, [5, 6], **options)
    assert _text(engine, [5, 6], stop=[whole[-2:] + "\x00never"], **options) == whole


def test_an_end_token_ends_the_generation_and_is_not_text(engine):
    ids = [5, 6, 7]
    greedy = next(engine.generate(ids, max_tokens=1, ignore_eos=True)).id
    engine.tokenizer.eog_ids, kept = frozenset({greedy}), engine.tokenizer.eog_ids
    try:
        assert list(engine.generate(ids, max_tokens=5)) == []
        assert engine.stats.finish_reason == "stop"
        assert len(list(engine.generate(ids, max_tokens=5, ignore_eos=True))) == 5
    finally:
        engine.tokenizer.eog_ids = kept


def test_chat_is_generate_after_the_template(smollm2):
    messages = [{"role": "user", "content": "hi"}]
    with airjax.load(smollm2, vram_budget_gib=1, context=128) as engine:
        ids = engine.apply_chat_template(messages)
        assert engine.tokenizer.decode(ids).endswith(
            "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        )
        chat = [token.id for token in engine.chat(messages, max_tokens=8)]
        assert chat == [token.id for token in engine.generate(ids, max_tokens=8)]


@pytest.mark.parametrize(
    ("ids", "options", "sentence"),
    [
        ([], {}, "the prompt is empty: give at least one token"),
        ([1] * 128, {}, "the prompt has 128 tokens but the context holds 128"),
        ([1, 9999], {}, "token ids must be between 0 and .*, got 9999"),
        ([-1], {}, "token ids must be between 0 and .*, got -1"),
        ([1], {"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ([1], {"stop": "END"}, "stop must be a list of strings"),
        ([1], {"stop": [""]}, "stop must be a list of strings that are not empty"),
    ],
)
def test_a_bad_request_is_refused_before_it_runs(engine, ids, options, sentence):
    with pytest.raises(RequestError, match=sentence):
        engine.generate(ids, **options)


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"vram_budget_gib": 0.01}, PlanError, "the smallest that can work is"),
        ({"vram_budget_gib": -1}, RequestError, "vram_budget_gib must be a positive number of GiB, got -1"),
        ({"vram_budget_gib": float("nan")}, RequestError, "vram_budget_gib must be a positive number"),
        ({"context": 0}, PlanError, "context must be between 1 and"),
        ({"context": 1 << 30}, PlanError, "context must be between 1 and"),
        ({"stream_depth": 0}, PlanError, "stream_depth must be at least 1, got 0"),
        ({"prefill_chunk": 0}, PlanError, "prefill_chunk must be at least 1, got 0"),
        ({"resident": "some"}, RequestError, "resident must be one of auto, none, all, dense, got 'some'"),
        ({"compute_dtype": "int8"}, RequestError, "compute_dtype must be one of"),
        ({"tier": "registered mapping"}, PlanError, "tier must be auto, aliased mapping"),
        ({"resident": "none", "ram_budget_gib": 1e-5}, PlanError, "pass --ram_budget_gib="),
    ],
)
def test_a_bad_plan_is_refused(path, options, error, sentence):
    with pytest.raises(error, match=sentence):
        airjax.load(path, **options)


def test_the_smallest_budget_named_by_a_refusal_works(path):
    with pytest.raises(PlanError) as caught:
        airjax.load(path, vram_budget_gib=0.01)
    words = str(caught.value).split("the smallest that can work is ")[1]
    smallest = float(words.split(" GiB")[0])
    options = {"stream_depth": 1, "resident": "none", "kv_shuttle": "on"}
    with airjax.load(path, vram_budget_gib=smallest, **options) as engine:
        assert engine.logits([1, 2]).shape[0] == 2
    with pytest.raises(PlanError):
        airjax.load(path, vram_budget_gib=smallest - 0.002, **options)


_ARCHITECTURE = b"general.architecture" + (8).to_bytes(4, "little") + (5).to_bytes(8, "little")


def _patched(path, target, old, new):
    data = path.read_bytes()
    assert data.count(old) >= 1 and len(old) == len(new)
    target.write_bytes(data.replace(old, new))
    return target


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        (b"llama.block_count", b"llama.block_cou_t", "metadata llama.block_count is missing"),
        (b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight", "tensor blk.1.ffn_up.weight is missing"),
        (b"token_embd.weight", b"token_xxxx.weight", "tensor token_embd.weight is missing"),
        (b"blk.3.", b"blk.7.", "layer 3 has no tensors|tensor blk.3.attn_norm.weight is missing"),
        (
            _ARCHITECTURE + b"llama",
            _ARCHITECTURE + b"mamba",
            "architecture 'mamba' has state-space, linear-attention or convolution layers and can't be run",
        ),
    ],
)
def test_a_file_that_does_not_fit_its_architecture_is_refused(path, tmp_path, old, new, sentence):
    broken = _patched(path, tmp_path / "broken.gguf", old, new)
    with pytest.raises(GGUFError, match=sentence) as caught:
        airjax.load(broken, vram_budget_gib=1)
    assert str(broken) in str(caught.value)


def test_a_file_that_shrinks_while_it_is_open_is_a_clear_error(path, tmp_path):
    copy = tmp_path / "copy.gguf"
    shutil.copy(path, copy)
    with airjax.load(copy, vram_budget_gib=1, context=128, resident="none") as engine:
        draws = engine.generate([1, 2, 3], max_tokens=50, ignore_eos=True)
        next(draws)
        os.truncate(copy, copy.stat().st_size - 4096)
        with pytest.raises(GGUFError, match="the file changed while it was open: load it again"):
            list(draws)
        # No array may look at the lost pages again.
        os.truncate(copy, path.stat().st_size)


def test_loading_and_closing_many_times_leaks_no_device_memory(path):
    def alive():
        return sum(array.nbytes for array in jax.live_arrays() if not array.is_deleted())

    for resident in ("none", "all"):
        before = None
        for _ in range(5):
            with airjax.load(path, vram_budget_gib=1, context=128, resident=resident) as engine:
                engine.logits([1, 2, 3])
            before = before or alive()
            assert alive() <= before


def test_a_model_without_a_template_says_so(gemma3):
    with (
        airjax.load(gemma3, vram_budget_gib=2, context=128) as engine,
        pytest.raises(RequestError, match="has no chat template: it is a base model"),
    ):
        engine.chat([{"role": "user", "content": "hi"}])
