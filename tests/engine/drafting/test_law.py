"""How many tokens to draft: against costs and rates of which the best choice is known."""

import pytest

from airjax.engine.drafting.drafter import Draft
from airjax.engine.drafting.law import FORCED, Acceptance, Costs, Law, checked, prior, tenth
from airjax.engine.drafting.rows import padded

MARK = ("model", 7)


def chain(marks):
    return Draft(tuple(range(len(marks))), tuple(marks))


def costs_of(seconds, apart=False, wait=0.0):
    costs = Costs(apart, (lambda rows: rows) if apart else padded)
    for rows, each in seconds.items():
        for _ in range(4):
            costs.observe(rows, each, wait, "program")
    return costs


def law_of(seconds, rate=None, **options):
    acceptance = Acceptance()
    if rate is not None:
        for n in range(400):
            acceptance.learn([(MARK, int(n * rate) < int((n + 1) * rate))])
    return Law(costs_of(seconds, **options), acceptance)


def test_the_first_run_of_a_program_is_no_measure():
    costs = Costs(True, lambda rows: rows)
    assert not costs.observe(1, 9.0, 0.0, "a")
    assert not costs.known
    assert costs.observe(1, 1.0, 0.0, "a")
    costs.observe(1, 9.0, 0.0, "b")
    assert costs.seconds(1) == 1.0


def test_rows_that_were_never_seen_cost_what_is_known_of_their_neighbours():
    apart = costs_of({1: 1.0}, apart=True)
    assert apart.seconds(5) == 5.0
    link_bound = costs_of({1: 1.0}, apart=True, wait=0.9)
    assert link_bound.seconds(5) == 1.0
    assert link_bound.seconds(20) == pytest.approx(2.0)
    shared = costs_of({1: 1.0, 8: 3.0})
    assert shared.seconds(16) == 3.0
    assert 1.0 <= shared.seconds(3) <= 3.0


def test_where_rows_cost_nothing_all_of_a_good_draft_is_kept():
    law = law_of({1: 1.0, 2: 1.0, 4: 1.0, 8: 1.0, 16: 1.0}, rate=0.9)
    assert law.ask(15) == 15
    assert len(law.keep(chain([MARK] * 15), 15).tokens) == 15


def test_where_rows_cost_as_much_as_sweeps_nothing_is_drafted():
    law = law_of({1: 1.0, 2: 2.0, 3: 3.0}, rate=1.0, apart=True)
    assert law.ask(15) == 0
    assert law.keep(chain([FORCED] * 3), 3).tokens == ()


@pytest.mark.parametrize("rate", [0.2, 0.5, 0.8, 0.95])
def test_the_number_kept_is_the_best_of_all(rate):
    seconds = {1: 1.0, 2: 1.1, 4: 1.3, 8: 2.0, 16: 3.5}
    law = law_of(seconds, rate=rate)
    chance = law.acceptance.of(MARK)
    assert chance == pytest.approx(rate, abs=0.06)

    def tokens_per_second(count):
        gain = 1 + sum(chance ** (at + 1) for at in range(count))
        return gain / seconds[padded(count + 1)] / (1.03 if not count else 1 / 1)

    kept = len(law.keep(chain([MARK] * 15), 15).tokens)
    best = max(range(16), key=tokens_per_second)
    assert kept == (best if tokens_per_second(best) > 1.03 else 0)


def test_a_sequence_learns_from_its_own_drafts_and_begins_with_those_of_others():
    everyone = Acceptance()
    assert everyone.of(MARK) == prior(MARK)
    assert prior(("lookup", 32)) > prior(("lookup", 2)) > 0
    one = Acceptance(everyone)
    for _ in range(50):
        one.learn(checked(chain([MARK, MARK]), []))  # the second was never looked at
    assert one.of(MARK) < 0.1
    assert Acceptance(everyone).of(MARK) == everyone.of(MARK) < 0.1
    assert one.of(FORCED) == 1.0


def test_it_goes_to_sleep_only_where_that_gains_something():
    seconds = {1: 1.0, 2: 1.5, 4: 2.0}
    for may_sleep in (False, True):
        law = Law(costs_of(seconds), Acceptance(), may_sleep)
        for _ in range(20):
            if law.ask(3):
                assert not law.keep(chain([("lookup", 2)] * 3), 3).tokens
        assert law.asleep == may_sleep


def test_a_slow_drafter_stops_where_the_next_token_is_not_worth_its_time():
    law = law_of({1: 1.0, 2: 1.0, 4: 1.0, 8: 1.0, 16: 1.0}, rate=0.5)

    def drafted(token_s):
        go_on = law.going_on(token_s)
        return next(count for count in range(1, 100) if not go_on(MARK))

    assert drafted(0.3) == 1
    assert 2 <= drafted(0.1) <= 3
    assert drafted(0.01) > drafted(0.1)
    assert law.rate(chain([MARK]), 9, 0.0) > law.rate(chain([MARK]), 9, 1.0)


def test_probabilities_fall_into_ten_classes():
    assert [tenth(p) for p in (0.0, 0.05, 0.1, 0.95, 1.0)] == [0, 0, 1, 9, 9]
