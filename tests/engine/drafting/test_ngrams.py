"""Prompt lookup, against a search through the whole text."""

import time

import jax
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from airjax.engine.drafting import Lookup, Sequel


def propose(drafter, after=(), most=8):
    return drafter.propose(Sequel([], None, jax.random.key(0), 0), after, most, lambda mark: True)


def by_search(text, certain, most):
    """What follows the newest earlier occurrence of the longest of the n-grams that are looked up."""
    for length in (8, 4, 2):
        tail = text[-length:]
        for at in range(certain - 1, length - 1, -1):  # where the follower stands
            if len(tail) == length and text[at - length : at] == tail:
                copied = list(text)
                for more in range(most):
                    copied.append(copied[at + more])
                return tuple(copied[len(text) :])
    return ()


@given(
    st.lists(st.integers(0, 3), max_size=60),
    st.lists(st.integers(0, 3), max_size=4),
    st.integers(1, 12),
    st.integers(1, 7),
)
def test_it_copies_what_followed_the_newest_occurrence(text, after, most, piece):
    drafter = Lookup()
    for begin in range(0, len(text), piece):
        drafter.push(text[begin : begin + piece])
    draft = propose(drafter, after, most)
    assert draft.tokens == by_search([*text, *after], len(text), most)
    assert len(draft.marks) == len(draft.tokens)


def test_a_longer_match_is_marked_as_one():
    drafter = Lookup()
    drafter.push([*range(40), 99, *range(20)])
    long = propose(drafter)
    assert long.tokens == tuple(range(20, 28))
    drafter = Lookup()
    drafter.push([7, 18, 19, 20, 21, 22, 23, 99, 18, 19])
    assert propose(drafter, most=4).tokens == (20, 21, 22, 23)
    assert propose(drafter, most=4).marks[0] < long.marks[0]


def test_a_token_costs_as_much_in_a_long_text_as_in_a_short_one():
    generator = np.random.default_rng(0)

    def seconds(count):
        drafter = Lookup()
        drafter.push(generator.integers(0, 50, count).tolist())
        more = generator.integers(0, 50, 2000).tolist()
        start = time.process_time()
        for token in more:
            drafter.push([token])
            propose(drafter)
        return time.process_time() - start

    short = min(seconds(1000) for _ in range(3))
    assert min(seconds(100_000) for _ in range(3)) < 4 * short
