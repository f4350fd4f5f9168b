"""The real models against a float32 reference made from gguf's own decoders, in torch."""

from pathlib import Path

from torch_models import max_kl, torch_logits

import airjax

_PROSE = (Path(__file__).parents[1] / "data" / "prose.txt").read_text()


def _compare(path, count):
    with airjax.load(path, vram_budget_gib=3, context=1024, compute_dtype="float32") as engine:
        ids = engine.tokenizer.encode(_PROSE)[:count]
        assert len(ids) == count
        return max_kl(torch_logits(path, ids), engine.logits(ids))


def test_smollm2_is_that_of_the_reference(smollm2):
    assert _compare(smollm2, 256) < 1e-4


def test_gemma3_is_that_of_the_reference_past_its_window(gemma3):
    assert _compare(gemma3, 600) < 1e-4


def test_smollm2_token_by_token_is_that_of_the_reference(smollm2):
    with airjax.load(
        smollm2, vram_budget_gib=3, context=256, compute_dtype="float32", prefill_chunk=1
    ) as engine:
        ids = engine.tokenizer.encode(_PROSE)[:64]
        assert max_kl(torch_logits(smollm2, ids), engine.logits(ids)) < 1e-4
