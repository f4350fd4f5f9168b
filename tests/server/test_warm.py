"""Compiling before the first client comes."""

from toy_models import toy_llama

import airjax
from airjax.bench.compilations import compilations
from airjax.server.order import Order
from airjax.server.sampler import Settings, make_sampler
from airjax.server.warm import warm_up


def test_the_first_client_of_a_warm_server_waits_for_no_compilation(tmp_path):
    path = toy_llama(tmp_path / "toy.gguf", layers=2)
    with airjax.load(path, vram_budget_gib=1, context=128, max_batch=4, resident="all") as opened:
        warm_up(opened, full=False)
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


def test_after_a_full_warm_up_no_number_of_clients_waits_for_a_compilation(tmp_path):
    path = toy_llama(tmp_path / "toy.gguf", layers=2)
    stages = []
    options = {"vram_budget_gib": 1, "context": 300, "max_batch": 4, "prefill_chunk": 256}
    with airjax.load(path, resident="all", **options) as opened:
        warm_up(opened, full=True, tell=stages.append)
        before = compilations()
        scheduler = opened.scheduler(make_sampler(Settings()))
        for count, tokens in ((1, 70), (2, 3), (3, 9), (4, 30), (1, 250)):
            for first in range(count):
                ids = (first, *range(1, tokens))
                scheduler.submit(Order(ids, Settings(temperature=0.7), 1, 0, 3, frozenset(), 0).request())
            while scheduler.busy:
                scheduler.step()
        scheduler.close()
    assert compilations() == before
    assert stages[0] == f"compiling, 1 of {len(stages)}" and stages[-1].startswith(
        f"compiling, {len(stages)} "
    )
