"""The thread between requests and sweeps."""

import threading

import pytest
from toy_models import toy_llama
from toy_server import serve_toy

from airjax import engine as engines
from airjax.server import worker


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    path = toy_llama(tmp_path_factory.mktemp("toy") / "toy.gguf", layers=1, block_type="Q8_0")
    with serve_toy(path) as client:
        yield client


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
