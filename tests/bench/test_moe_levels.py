"""The levels of mixtures of experts beside llama.cpp: its placement, and the table."""

import re

import gguf
import llama_cpp_peer as peer
import moe_levels
import numpy as np
import pytest
import synthetic

from airjax.gguf import open_gguf


def _weights(tmp_path, name):
    path = str(tmp_path / "tiny.gguf")
    synthetic.write(path, synthetic.SHAPES[name], gguf.GGMLQuantizationType.Q4_K)
    with open_gguf(path) as file:
        return peer.weigh(file), {name: info.nbytes for name, info in file.tensors.items()}


def test_experts_fill_the_budget_of_llama_cpp_from_the_last_layer_on(tmp_path):
    weights, sizes = _weights(tmp_path, "tiny-moe")
    a_tensor = sizes["blk.0.ffn_up_exps.weight"]
    others = sum(nbytes for name, nbytes in sizes.items() if "_exps" not in name) - sizes["token_embd.weight"]
    least = others + 4 * 2 * (2 * 64 + 2 * 64) * 100 + 1000  # keys and values of 100 positions, compute
    placed = (
        (least, 0),
        (least + a_tensor - 1, 0),
        (least + a_tensor, 1),
        (least + 11 * a_tensor, 11),
        (1e12, 12),
    )
    for budget, count in placed:
        assert peer.place(weights, budget, 100, lambda _: 1000) == count
    with pytest.raises(ValueError, match="more than the VRAM budget"):
        peer.place(weights, least - 1, 100, lambda _: 1000)
    on_cpu = [name for name in sizes if re.search(peer.overrides(weights, 2), name)]
    assert len(on_cpu) == 10 and [name for name in on_cpu if name.startswith("blk.3.")] == [
        weights.movable[2][0] + ".weight"
    ]
    assert peer.overrides(weights, 12) == ""


def test_whole_layers_with_their_caches_fill_the_budget_of_llama_cpp(tmp_path):
    weights, sizes = _weights(tmp_path, "tiny")
    a_layer = sum(nbytes for name, nbytes in sizes.items() if name.startswith("blk.3."))
    cache = 2 * (2 * 64 + 2 * 64) * 100
    least = sizes["output.weight"] + sizes["output_norm.weight"]
    # What fits without a compute buffer does not with the one that it needs, which shrinks with what is on the GPU.
    assert peer.place(weights, least + 3 * (a_layer + cache), 100, lambda count: a_layer * count / 3) == 2
    assert peer.place(weights, least + 3 * (a_layer + cache), 100, lambda _: 0) == 3
    assert peer.place(weights, least + 3 * a_layer, 100, lambda _: 0) == 2
    assert peer.overrides(weights, 2) == ""


def test_routers_of_another_skew_leave_all_else_as_it_was(tmp_path):
    path, shape = tmp_path / "tiny.gguf", synthetic.SHAPES["tiny-moe"]
    synthetic.write(str(path), shape, gguf.GGMLQuantizationType.Q4_K, skew=1)
    with open_gguf(path) as file:
        before = {name: file.raw(name).copy() for name in file.tensors}
    synthetic.skew_routers(str(path), shape, 0)
    with open_gguf(path) as file:
        for name, data in before.items():
            router = name.endswith("ffn_gate_inp.weight")
            assert np.array_equal(file.raw(name), data) != router
            if router:  # no expert is preferred: the weights for the constant place are zero
                assert not file.raw(name).view(np.float32).reshape(shape.experts, -1)[:, 0].any()


def test_the_table_says_how_many_times_as_fast_and_why_one_was_not_run():
    own = {"phases": {"prefill": {"tokens_per_s": 900.0}, "decode": {"tokens_per_s": 30.0}}}
    theirs = {"prefill_rate": 300.0, "decode_rate": 20.0, "note": "3 of 4 on the GPU", "device_bytes": 7.5e9}
    both = moe_levels.beside({("30b-a3b", "1", "8", 1): {"airjax": own, "llama.cpp": theirs}})
    assert "| prefill | 900.0 | 300.0 | 3.00 | 3 of 4 on the GPU, 7.50 GB |" in both
    assert "| decode | 30.0 | 20.0 | 1.50 |" in both
    alone = moe_levels.beside({("30b-a3b", "1", "8", 32): {"airjax": own, "llama.cpp": "not installed"}})
    assert "| decode | 30.0 | not run | n/a | not installed |" in alone
