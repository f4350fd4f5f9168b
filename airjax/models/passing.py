"""In which order a block uses its tensors, by their names: a layer that is cut into pieces passes in that order."""

from __future__ import annotations

from collections.abc import Iterable

from airjax.gguf import Layout

# Prefixes of short names, the longest that fits counts; tensors of one rank are used together.
_RANKS = {
    "": 0,
    "attn_output": 1,
    "laurel": 1,
    "post_attention": 1,
    "ffn": 2,
    "exp_probs": 2,
    "ffn_gate.": 3,
    "ffn_up.": 4,
    "ffn_down.": 5,
    "post_ffw": 5,
    "layer_output": 5,
    "inp_gate": 6,
    "proj": 6,
    "post_norm": 6,
}


def use_rank(name: str) -> int:
    """When a tensor is used, relative to the others of its layer. A wrong rank costs memory, never the numbers."""
    return _RANKS[max((prefix for prefix in _RANKS if name.startswith(prefix)), key=len)]


def passing_order(layout: Layout) -> tuple[int, ...]:
    """The pieces of a layer in the order in which they are first used."""
    ranks = _ranks(layout)
    return tuple(sorted(layout.pieces, key=lambda piece: (min(ranks[piece]), max(ranks[piece]), piece)))


def held_at_once(layout: Layout) -> int:
    """How many pieces of a layer are in use at the same time, at most; 1 for a layer that is not cut."""
    ranks = _ranks(layout).values()
    return max((sum(min(own) <= at <= max(own) for own in ranks) for at in _RANKS.values()), default=1) or 1


def _ranks(layout: Layout) -> dict[int, Iterable[int]]:
    ranks: dict[int, list[int]] = {piece: [] for piece in layout.pieces}
    for name, slot in layout.tensors:
        if slot.extent in ranks:
            ranks[slot.extent].append(use_rank(name))
    return dict(ranks)
