"""Opens a draft model beside the model that it drafts for."""

from __future__ import annotations

from pathlib import Path

import jax

from airjax.engine.model import Model, open_model
from airjax.gguf import open_gguf
from airjax.plan import GIB, PlanError
from airjax.text import Tokenizer, Translation, same_vocabulary

_DEFAULT_CONTEXT = 4096
# Fewer tokens in common than this share, and most drafts would end after their first token.
_LEAST_SHARED = 0.25


def open_draft_model(
    path: Path,
    target: Path,
    *,
    device: jax.Device,
    vram_budget_bytes: int,
    ram_budget_bytes: int,
    context: int | None,
    prefill_chunk: int | None,
    compute_dtype: str,
    max_batch: int | None = None,
    kv_tokens: int | None = None,
) -> Model:
    """Opens a draft model, all of it on the device.

    Args:
      path: its file.
      target: the file of the model that it drafts for.
      device: of both.
      vram_budget_bytes, ram_budget_bytes: of both together.
      context: of the other model; None for its default.
      prefill_chunk, compute_dtype, max_batch, kv_tokens: as for `open_model`.

    Raises:
      GGUFError: one of the files can't be run.
      PlanError: the draft model does not fit.
    """
    longest = _context_length(path)
    wanted = min(_context_length(target), _DEFAULT_CONTEXT) if context is None else context
    try:
        return open_model(
            path,
            device=device,
            vram_budget_bytes=vram_budget_bytes,
            ram_budget_bytes=ram_budget_bytes,
            context=max(min(wanted, longest), 1),
            stream_depth=1,
            resident="all",
            kv_shuttle="off",
            compute_dtype=compute_dtype,
            prefill_chunk=prefill_chunk,
            max_batch=max_batch,
            kv_tokens=kv_tokens,
        )
    except PlanError as error:
        raise PlanError(f"the draft model must fit on the device as a whole: {error}") from error


def budget_beside(draft: Model, vram_budget_bytes: int) -> int:
    """What the draft model leaves of the device memory.

    Raises:
      PlanError: nothing.
    """
    left = vram_budget_bytes - draft.plan.peak_bytes
    if left <= 0:
        raise PlanError(f"{taken(draft, vram_budget_bytes)}: nothing is left for the model")
    return left


def taken(draft: Model, vram_budget_bytes: int) -> str:
    """What a draft model takes, for messages."""
    return (
        f"the draft model {draft.gguf.path} takes {draft.plan.peak_bytes / GIB:.3f} GiB of the budget of "
        f"{vram_budget_bytes / GIB:.3f} GiB"
    )


def translation(draft: Model, ours: Tokenizer, path: str) -> Translation | None:
    """Between the vocabularies of a model and its draft model; None where they are the same.

    Args:
      draft: the draft model.
      ours: of the model.
      path: of the model's file, for messages.

    Raises:
      TextError: the draft model's tokenizer can't be used.
      ValueError: the two have too little in common.
    """
    theirs = Tokenizer.from_metadata(draft.gguf.metadata, str(draft.gguf.path))
    if same_vocabulary(ours, theirs):
        return None
    between = Translation(ours, theirs)
    smaller = min(ours.vocab_size, theirs.vocab_size)
    if between.shared < _LEAST_SHARED * smaller:
        raise ValueError(
            f"the draft model must have the vocabulary of the model, or a quarter of it in common: {draft.gguf.path} "
            f"has {theirs.vocab_size} tokens and {path} has {ours.vocab_size}, of which {between.shared} are the same "
            "text: use a smaller model of the same family, or --draft=lookup"
        )
    return between


def _context_length(path: Path) -> int:
    gguf = open_gguf(path)
    try:
        return gguf.get(f"{gguf.get('general.architecture', str)}.context_length", int)
    finally:
        gguf.close()
