"""What a trace of the profiler says about a stream, and real weights written wider."""

import gguf
import numpy as np
import traced
import widen
from toy_models import toy_llama
from traced import Event

import airjax


def test_events_that_overlap_count_once():
    events = [Event("b", 900_000, 1_000_000), Event("a", 0, 400_000), Event("a", 100_000, 300_000)]
    # From 400 to 900 us nothing ran.
    assert traced.idle_of(events) == traced.Idle(1_000_000, 500_000, 500_000, 1, 500_000)


def test_short_pauses_are_no_gaps():
    idle = traced.idle_of([Event("a", 0, 10_000), Event("b", 110_000, 120_000)])
    assert (idle.idle, idle.gaps, idle.gaps_ns) == (100_000, 0, 0)


def test_the_longest_come_first():
    events = [Event("b", 0, 5), Event("a", 5, 8), Event("a", 9, 12)]
    assert traced.longest(events, 5) == [("a", 6, 2), ("b", 5, 1)]
    assert traced.longest(events, 1) == [("a", 6, 2)]


def test_a_widened_model_is_the_same_model(tmp_path):
    path = toy_llama(tmp_path / "toy.gguf", block_type="Q8_0")
    wide = tmp_path / "wide.gguf"
    widen.widen(str(path), str(wide))
    kinds = {tensor.tensor_type for tensor in gguf.GGUFReader(str(wide)).tensors}
    assert kinds == {gguf.GGMLQuantizationType.F32}
    logits, bytes_per_sweep = [], []
    for each in (path, wide):
        with airjax.load(
            str(each), vram_budget_gib=1, context=32, resident="none", compute_dtype="float32"
        ) as loaded:
            logits.append(np.asarray(loaded.logits(list(range(3, 15)))))
            bytes_per_sweep.append(loaded.plan.bytes_per_sweep)
            assert loaded.tokenizer.encode("ab") is not None
    np.testing.assert_array_equal(logits[0], logits[1])
    assert bytes_per_sweep[1] > 2 * bytes_per_sweep[0]
