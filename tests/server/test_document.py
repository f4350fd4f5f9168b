"""Schemathesis over the published document: whatever fits it, or does not, gets an answer below 500."""

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.generation import GenerationMode
from toy_models import toy_llama
from toy_server import serve_toy

from airjax.server.openapi import POSTS, document


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    path = toy_llama(tmp_path_factory.mktemp("toy") / "toy.gguf", layers=2, block_type="Q8_0")
    with serve_toy(path, max_queue=256, request_timeout_s=2.0) as client:
        yield client


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("route", list(POSTS))
def test_no_body_makes_the_server_fail(client, route, mode):
    operation = schemathesis.openapi.from_dict(document())[route]["POST"]

    @settings(
        max_examples=8,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(data=st.data())
    def check(data):
        case = data.draw(operation.as_strategy(generation_mode=mode))
        answer = client.post(route, **sent(case))
        # 504: the time of two seconds was up, which a body may well ask for.
        assert answer.status_code < 500 or answer.status_code == 504, (case.body, answer.text)

    check()
    assert client.get("/health").status_code == 200


def sent(case):
    """The body as JSON, unless it is something else."""
    if isinstance(case.body, bytes):
        return {"content": case.body}
    return {} if case.body is schemathesis.core.NOT_SET else {"json": case.body}
