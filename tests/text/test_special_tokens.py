from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from airjax.text.special_tokens import SpecialTokens


def split(text: str, *tokens: str) -> list[str | int]:
    return SpecialTokens({token: index for index, token in enumerate(tokens)}).split(text)


def test_plain_text_stays_whole():
    assert split("plain", "<a>") == ["plain"]
    assert split("plain") == ["plain"]
    assert split("", "<a>") == []


def test_tokens_are_cut_out_with_the_text_between():
    assert split("x<a>y<b><a>", "<a>", "<b>") == ["x", 0, "y", 1, 0]


def test_the_longest_token_wins_over_an_earlier_one():
    assert split("xabcd", "xa", "abcd") == ["x", 1]


def test_a_shorter_token_is_tried_where_the_longest_does_not_fit():
    assert split("aab<b>", "aab", "aa", "b<b>") == [1, 2]


def test_runs_take_the_longest_first():
    assert split("\n" * 8, "\n", "\n\n", "\n\n\n") == [2, 2, 1]


def test_size_is_measured_in_bytes():
    assert split("ab日", "ab", "b日") == ["a", 1]


def test_equally_long_tokens_are_found_from_the_left():
    assert split("xaby", "ab", "xa") == [1, "by"]


def by_definition(text: str, tokens: list[str]) -> list[str | int]:
    """One token after another, the longest first: the first find of each cuts the text that is left."""
    fragments: list[str | int] = [text] if text else []
    for token in sorted(tokens, key=lambda token: -len(token.encode())):
        cut: list[str | int] = []
        for fragment in fragments:
            if isinstance(fragment, str):
                first, *rest = fragment.split(token)
                cut.append(first)
                for part in rest:
                    cut += [tokens.index(token), part]
            else:
                cut.append(fragment)
        fragments = [fragment for fragment in cut if fragment != ""]
    return fragments


@given(
    st.text("ab<>", max_size=30),
    st.lists(st.text("ab<>", min_size=1, max_size=5), min_size=1, max_size=6, unique_by=len),
)
def test_equals_one_pass_per_token(text, tokens):
    assert split(text, *tokens) == by_definition(text, tokens)
