"""The thread between requests and sweeps."""

import threading

import pytest
from toy_models import toy_llama
from toy_server import serve_toy

from airjax import engine as engines
from airjax.engine import drafting
from airjax.engine.drafting.law import Costs
from airjax.server import worker


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return toy_llama(tmp_path_factory.mktemp("toy") / "toy.gguf", layers=1, block_type="Q8_0")


@pytest.fixture(scope="module")
def client(path):
    with serve_toy(path) as client:
        yield client


def test_a_drafter_that_fails_costs_a_request_its_drafts_and_nothing_else(path, client, monkeypatch, caplog):
    body = {"prompt": "abcabcabc", "max_tokens": 12, "temperature": 0, "logprobs": 1}
    (expected,) = client.post("/v1/completions", json=body).json()["choices"]

    def failing(*_):
        raise RuntimeError("a broken table")

    monkeypatch.setattr(Costs, "known", True)
    monkeypatch.setattr(Costs, "seconds", lambda self, rows: 1.0)
    monkeypatch.setattr(drafting.Lookup, "propose", failing)
    with serve_toy(path, load={"draft": "lookup"}) as drafted:
        for _ in range(2):
            (choice,) = drafted.post("/v1/completions", json=body).json()["choices"]
            assert choice == expected
    told = {record.getMessage() for record in caplog.records if "drafting by" in record.getMessage()}
    assert told == {
        "airjax: drafting by lookup failed, the text goes on without: RuntimeError: a broken table"
    }


def test_after_a_long_sweep_a_client_that_comes_back_at_once_misses_none(client, monkeypatch):
    monkeypatch.setattr(worker, "_LONG_STEP_S", 0.0)
    monkeypatch.setattr(worker, "_LINGER", 20_000.0)
    step, sizes, both = engines.Scheduler.step, [], threading.Event()

    def counted(self):
        sizes.append(self.running + self.waiting)
        if sizes[-1] == 2:
            both.set()
        return step(self)

    monkeypatch.setattr(engines.Scheduler, "step", counted)

    def ask(tokens):
        body = {"prompt": "abc", "max_tokens": tokens, "temperature": 0}
        assert client.post("/v1/completions", json=body).status_code == 200

    long = threading.Thread(target=ask, args=(200,))
    long.start()
    for _ in range(4):
        ask(3)
    monkeypatch.setattr(worker, "_LINGER", 0.0)  # nobody comes back after this one
    ask(3)
    long.join()
    assert both.is_set()
    first, last = sizes.index(2), len(sizes) - sizes[::-1].index(2)
    assert set(sizes[first:last]) == {2}
