"""The order in which the pieces of a layer pass: that of their use."""

import pytest
from gguf import GGMLQuantizationType as GGMLType

from airjax.gguf import Layout, Slot
from airjax.models import held_at_once, passing_order


def layout(*pieces):
    """A layer whose pieces hold tensors of these names, in the order of the file."""
    slots = [
        (name, Slot(GGMLType.F32, (64,), number, 256 * at, 256))
        for number, names in enumerate(pieces)
        for at, name in enumerate(names.split())
    ]
    return Layout(tuple(sorted(slots)), (1024,) * len(pieces), tuple(range(len(pieces))))


ATTENTION = "attn_k.weight attn_output.weight attn_q.weight attn_v.weight"


@pytest.mark.parametrize(
    ("pieces", "order", "held"),
    [
        # As converters write them, by name.
        (("ffn_down.weight", "ffn_gate.weight", "ffn_up.weight", ATTENTION), (3, 1, 2, 0), 1),
        (("ffn_down.weight ffn_gate.weight", "ffn_up.weight", ATTENTION), (2, 0, 1), 2),
        (("attn_qkv.weight", "attn_output.weight ffn_up.weight", "ffn_down.weight"), (0, 1, 2), 1),
        # Experts are used together.
        (("ffn_down_exps.weight", "ffn_gate_exps.weight", "ffn_up_exps.weight", ATTENTION), (3, 0, 1, 2), 3),
        ((), (), 1),
    ],
)
def test_pieces_pass_in_the_order_of_their_use(pieces, order, held):
    assert passing_order(layout(*pieces)) == order
    assert held_at_once(layout(*pieces)) == held
