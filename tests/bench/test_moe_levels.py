"""The levels of mixtures of experts beside llama.cpp: its placement, and the table."""

import gguf
import moe_levels
import moe_peer
import synthetic

from airjax.gguf import open_gguf


def test_experts_fill_the_budget_from_the_last_layer_on(tmp_path):
    path = str(tmp_path / "tiny.gguf")
    synthetic.write(path, synthetic.SHAPES["tiny-moe"], gguf.GGMLQuantizationType["Q4_K"])
    with open_gguf(path) as file:
        sizes = {name: info.nbytes for name, info in file.tensors.items()}
    a_layer = sum(nbytes for name, nbytes in sizes.items() if name.startswith("blk.0.") and "_exps" in name)
    others = sum(nbytes for name, nbytes in sizes.items() if "_exps" not in name) - sizes["token_embd.weight"]
    kv_bytes = 1000
    least = moe_peer._RESERVE_BYTES + others + kv_bytes
    for budget, on_cpu in ((0, 4), (least, 4), (least + a_layer - 1, 4), (least + a_layer, 3), (1e12, 0)):
        assert moe_peer.layers_on_cpu(path, budget, kv_bytes) == (on_cpu, 4)


def test_the_table_says_how_many_times_as_fast_and_why_one_was_not_run():
    own = {"phases": {"prefill": {"tokens_per_s": 900.0}, "decode": {"tokens_per_s": 30.0}}}
    peer = {"prefill": 300.0, "decode": 20.0, "note": "experts of 3 of 4 layers on the GPU"}
    both = moe_levels.beside({("30b-a3b", "1", "8", 1): {"airjax": own, "llama.cpp": peer}})
    assert "| prefill | 900.0 | 300.0 | 3.00 | experts of 3 of 4 layers on the GPU |" in both
    assert "| decode | 30.0 | 20.0 | 1.50 |" in both
    alone = moe_levels.beside({("30b-a3b", "1", "8", 32): {"airjax": own, "llama.cpp": "not installed"}})
    assert "| decode | 30.0 | not run | n/a | not installed |" in alone
