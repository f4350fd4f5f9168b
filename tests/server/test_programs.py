"""A server that meets ever new sizes does not hold ever more compiled programs."""

from toy_models import toy_llama
from toy_server import serve_toy

from airjax.server.programs import Programs, allowed_maps, count_maps


def test_programs_are_dropped_when_there_are_too_many_and_answers_stay_the_same(tmp_path):
    path = toy_llama(tmp_path / "toy.gguf", layers=1)
    with serve_toy(path) as client:
        worker = client.app.state.airjax.worker

        def answers():
            return [
                client.post(
                    "/v1/completions", json={"prompt": "ab" * length, "max_tokens": 3, "temperature": 0}
                ).json()["choices"][0]["text"]
                for length in (3, 40, 70)
            ]

        before = answers()
        held = count_maps()
        worker.programs = Programs(most_maps=1, period_s=0.0)
        assert answers() == before
        assert worker.programs.dropped >= 3 and count_maps() < held
        worker.programs = Programs()
        assert answers() == before and worker.programs.dropped == 0


def test_the_limit_is_the_system_s():
    assert 0 < count_maps() < allowed_maps()
