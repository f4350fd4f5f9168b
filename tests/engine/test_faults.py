"""What goes wrong in the middle of a run: a clear error, nothing left behind, and an engine that can go on."""

import gc
import importlib
import os
import threading

import jax
import numpy as np
import pytest
from toy_models import toy_llama

import airjax
from airjax.streaming import readers

_IDS = list(range(3, 40))
_TIERS = {
    "mapping": {"resident": "none"},
    "ring": {"resident": "none", "tier": "ring"},
    "shuttle": {"resident": "none", "kv_shuttle": "on"},
    "resident": {"resident": "all"},
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return toy_llama(tmp_path_factory.mktemp("toys") / "toy.gguf", block_type="Q8_0", layers=6)


def _load(path, **options):
    return airjax.load(path, vram_budget_gib=1, context=128, **options)


def _tokens(engine):
    return [token.id for token in engine.generate(_IDS, max_tokens=8, ignore_eos=True)]


def _open_files():
    return len(os.listdir("/proc/self/fd"))


def _resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _fail_at(monkeypatch, engine, layer, error):
    """The weights of `layer` raise `error` once."""
    take = engine.model.weights.take
    left = [error]

    def failing(asked, *before):
        if asked == layer and left:
            raise left.pop()
        return take(asked, *before)

    monkeypatch.setattr(engine.model.weights, "take", failing)


@pytest.mark.parametrize("tier", _TIERS)
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("RESOURCE_EXHAUSTED: out of memory")])
def test_an_engine_goes_on_after_a_sweep_that_was_cut_short(toy, monkeypatch, tier, error):
    with _load(toy, **_TIERS[tier]) as engine:
        expected = _tokens(engine)
        _fail_at(monkeypatch, engine, 3, error)
        with pytest.raises(type(error)):
            _tokens(engine)
        assert _tokens(engine) == expected


def test_an_engine_goes_on_after_an_error_in_the_middle_of_decoding(toy, monkeypatch):
    with _load(toy, resident="none") as engine:
        expected = _tokens(engine)
        sweep = importlib.import_module("airjax.engine.sweep")
        steps = sweep._steps
        calls = []

        def failing(*args):
            calls.append(args)
            if len(calls) == 4:
                raise RuntimeError("device lost")
            return steps(*args)

        monkeypatch.setattr(sweep, "_steps", failing)
        with pytest.raises(RuntimeError, match="device lost"):
            _tokens(engine)
        assert _tokens(engine) == expected


def test_a_reader_that_fails_is_a_clear_error_and_the_engine_goes_on(toy, monkeypatch):
    with _load(toy, resident="none", tier="ring") as engine:
        expected = _tokens(engine)
        preadv = os.preadv
        left = [OSError(5, "Input/output error")]

        def failing(*args):
            if left:
                raise left.pop()
            return preadv(*args)

        monkeypatch.setattr(readers.os, "preadv", failing)
        with pytest.raises(readers.ReadError, match="Input/output error"):
            _tokens(engine)
        assert _tokens(engine) == expected


def test_closing_joins_every_thread_also_after_an_error(toy, monkeypatch):
    before = set(threading.enumerate())
    with pytest.raises(RuntimeError, match="broken"), _load(toy, resident="none", tier="ring") as engine:
        _fail_at(monkeypatch, engine, 2, RuntimeError("broken"))
        _tokens(engine)
    assert set(threading.enumerate()) == before


def test_a_model_that_cannot_be_opened_leaves_nothing_open(toy, monkeypatch):
    weights = importlib.import_module("airjax.engine.weights")
    before = _open_files()
    threads = threading.active_count()

    def failing(*args, **kwargs):
        raise RuntimeError("no room")

    monkeypatch.setattr(weights, "Ring", failing)
    for tier in ("ring", "auto"):
        with pytest.raises(RuntimeError, match="no room"):
            _load(toy, resident="none", tier=tier)
    gc.collect()
    assert _open_files() <= before and threading.active_count() == threads


@pytest.mark.parametrize("tier", _TIERS)
def test_loading_and_closing_many_times_leaks_nothing(toy, tier):
    def once():
        with _load(toy, **_TIERS[tier]) as engine:
            np.asarray(engine.logits(_IDS))

    def measured():
        gc.collect()
        live = sum(array.nbytes for array in jax.live_arrays() if not array.is_deleted())
        return _open_files(), threading.active_count(), live

    for _ in range(3):
        once()
    before, memory = measured(), _resident_bytes()
    for _ in range(50):
        once()
    assert measured() == before
    # 50 x 4 tiers: 200 loads. A leak of the smallest part of this model, its KV cache, would be 20 MB.
    assert _resident_bytes() - memory < 8 << 20
