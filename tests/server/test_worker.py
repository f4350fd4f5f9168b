"""The thread that owns the engine."""

from toy_models import toy_llama

import airjax
from airjax.bench.compilations import compilations
from airjax.server.sampler import Settings, make_sampler
from airjax.server.worker import Order, warm_up


def test_the_first_client_of_a_warm_server_waits_for_no_compilation(tmp_path):
    path = toy_llama(tmp_path / "toy.gguf", layers=2)
    with airjax.load(path, vram_budget_gib=1, context=128, max_batch=4, resident="all") as opened:
        warm_up(opened)
        before = compilations()
        scheduler = opened.scheduler(make_sampler(Settings()))
        settings = Settings(temperature=0.7, top_p=0.9)
        number = scheduler.submit(Order((3, 4, 5), settings, 1, 0, 4, frozenset(), 0).request())
        drawn = []
        while scheduler.busy:
            drawn += [event.token for event in scheduler.step() if event.request == number]
        scheduler.close()
    assert len(drawn) == 4
    assert compilations() == before
