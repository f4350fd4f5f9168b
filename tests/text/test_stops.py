"""Stop strings: whatever the pieces, the text is the same."""

from hypothesis import given
from hypothesis import strategies as st

from airjax.text import StopStrings

_LETTERS = st.text("ab", max_size=12)


@given(_LETTERS, st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.integers(1, 4))
def test_any_pieces_give_the_text_before_the_first_stop_string(text, strings, size):
    stops, out = StopStrings(strings), ""
    for at in range(0, len(text), size):
        out += stops.push(text[at : at + size])
        if stops.stopped:
            break
    out += stops.flush()
    seen = text[: (at // size + 1) * size] if text else ""
    cut = min((seen.index(string) for string in strings if string in seen), default=len(seen))
    assert out == seen[:cut] and stops.stopped == (cut < len(seen))
