"""Prompt lookup, against a search through the whole text."""

import time

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from airjax.engine.drafting import Draft, Lookup, Sequel


def propose(drafter, after=(), most=8):
    return drafter.propose(Sequel([], None, jax.random.key(0), 0), after, most, lambda mark: True)


def by_search(text, certain, most):
    """What follows the longest of some matches of the end; those are looked at first that a longer n-gram finds."""
    found = {}
    for length in (8, 4, 2, 1):
        tail = text[-length:]
        for at in range(certain - 1, length - 1, -1):  # where the follower stands
            if len(found) < 16 and len(tail) == length and text[at - length : at] == tail and at not in found:
                long = length
                while long < min(at, 32, len(text)) and text[at - 1 - long] == text[-1 - long]:
                    long += 1
                found[at] = long
    if not found:
        return ()
    at = max(found, key=lambda at: (found[at], at))
    copied = list(text)
    for more in range(most):
        copied.append(copied[at + more])
    return tuple(copied[len(text) :])


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 3), max_size=60),
    st.lists(st.integers(0, 3), max_size=4),
    st.integers(1, 12),
    st.integers(1, 7),
)
def test_it_copies_what_followed_the_longest_match(text, after, most, piece):
    drafter = Lookup()
    for begin in range(0, len(text), piece):
        drafter.push(text[begin : begin + piece])
    draft = propose(drafter, after, most)
    assert draft.trunk().tokens[:most] == by_search([*text, *after], len(text), most)
    assert len(draft.marks) == len(draft.tokens) == len(draft.above)
    assert all(-1 <= parent < at for at, parent in enumerate(draft.above))


def test_a_longer_match_is_marked_as_one():
    drafter = Lookup()
    drafter.push([*range(40), 99, *range(20)])
    long = propose(drafter)
    assert long.tokens == tuple(range(20, 28))
    drafter = Lookup()
    drafter.push([7, 18, 19, 20, 21, 22, 23, 99, 18, 19])
    assert propose(drafter, most=4).trunk().tokens == (20, 21, 22, 23)
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


def test_what_followed_elsewhere_is_a_branch():
    drafter = Lookup()
    drafter.push([1, 2, 3, 4, 50, 9, 2, 3, 6, 7, 9, 8, 3, 5, 1, 2, 3])
    draft = propose(drafter, most=2)
    ways = [token for token, parent in zip(draft.tokens, draft.above, strict=True) if parent < 0]
    assert ways == [4, 6, 5]  # matches of three tokens, of two, of one
    assert [mark[2] for mark, parent in zip(draft.marks, draft.above, strict=True) if parent < 0] == [0, 1, 2]
    assert draft.trunk().tokens == (4, 50)
    assert draft.tokens[2:4] == (6, 7)


def test_a_copy_goes_on_behind_an_edited_word():
    drafter = Lookup()
    drafter.push([*range(20), 99, *range(5)])
    assert propose(drafter).trunk().tokens[:2] == (5, 6)
    drafter.push([5, 70])  # instead of 6
    draft = propose(drafter, most=4)
    assert draft.tokens[:4] == (7, 8, 9, 10)
    assert draft.marks[0] == ("edited", 1, 0)
    drafter.push([71, 72])
    assert propose(drafter).tokens == ()


def test_a_part_of_a_tree_keeps_its_parents():
    tree = Draft((1, 2, 3, 4, 5), tuple("abcde"), (-1, 0, 1, 0, -1))
    assert tree.trunk() == Draft((1, 2, 3), tuple("abc"))
    assert tree.only([0, 3, 4]) == Draft((1, 4, 5), tuple("ade"), (-1, 0, -1))
    assert tree.without({2}) == Draft((1, 4, 5), tuple("ade"), (-1, 0, -1))
    assert tree.first(2).above == (-1, 0)
