"""What the load bench makes of the times that its clients saw."""

import pytest
import serve


def answer(client, start, times, tokens=None):
    return serve.Answer(client, start, times, len(times) if tokens is None else tokens)


def test_the_steady_rate_counts_what_comes_while_all_clients_are_at_work():
    answers = [
        answer(0, 0.0, [1.0, 2.0, 3.0]),
        answer(0, 3.0, [4.0, 5.0, 6.0]),
        answer(1, 0.0, [2.0, 3.0, 4.0, 5.0]),
    ]
    # From 2, when the second client has its first token, to 5, when it is done: three tokens each.
    assert serve.steady(answers) == pytest.approx(2.0)
    # Pieces of two tokens each count twice.
    assert serve.steady([*answers[:2], answers[2]._replace(tokens=8)]) == pytest.approx(3.0)
    assert serve.steady([answer(0, 0.0, [1.0]), answer(1, 0.0, [2.0])]) is None
    assert serve.steady([]) is None


def test_the_table_sets_the_server_beside_its_engine():
    def level(clients, rate, steady):
        times = {f"{name}_{percent}_s": 0.5 for name in ("first", "between") for percent in (50, 99)}
        return {
            "clients": clients,
            "cut": clients == 32,
            "failures": 0,
            "tokens_per_s": rate,
            "steady_tokens_per_s": steady,
            **times,
        }

    engine = [{"clients": 32, "tokens_per_s": 100.0, "decode_tokens_per_s": 120.0}]
    lines = serve.table(engine, [level(1, 4.0, None), level(32, 90.0, 108.0)]).splitlines()
    assert lines[1].startswith("1 | 4.00, - | 1.0 | -, - | -, -")
    assert lines[2].startswith("32 (cut) | 90.00, 108.00 | 22.5 | 100.00, 120.00 | 90.0 %, 90.0 %")
