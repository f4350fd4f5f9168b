"""Sizes of the KV cache, on the device and passing through it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from airjax import layers, models
from airjax.gguf import Manifest
from airjax.models import Architecture, Config
from airjax.plan import limits, sizes
from airjax.plan.asked import Asked
from airjax.plan.values import PlanError


class Cache(NamedTuple):
    """Sizes of the KV cache of all layers, and of the workspace that goes with it.

    Attributes:
      slots: positions of each layer.
      nbytes: of all rows.
      block: positions that the shuttle sends in one piece.
      pieces: how many of these may be on the device at once.
      passing_bytes: of that many pieces.
      workspace_bytes: of the largest step, with the cache on the device.
      shuttled_workspace_bytes: with the cache on the host.
    """

    slots: tuple[int, ...]
    nbytes: int
    block: int
    pieces: int
    passing_bytes: int
    workspace_bytes: int
    shuttled_workspace_bytes: int


def sizes_of_cache(manifest: Manifest, config: Config, asked: Asked) -> Cache:
    """The cache of the layers of `manifest`."""
    architecture = models.get(config.architecture)
    context, chunk, kv_tokens, max_batch = asked.context, asked.chunk, asked.kv_tokens, asked.max_batch
    first = asked.first_layer or 0
    own = range(first, first + len(manifest.layers))
    slots = tuple(_slots(architecture, config, layer, context, chunk) for layer in own)
    shapes = [config.kv_shape(architecture.layer_kind(config, layer)) for layer in own]
    row_bytes = [2 * heads * layers.row_bytes(width, config.kv_dtype) for heads, width in shapes]
    # Of the layer with the largest rows, where they differ.
    position_bytes = max(row_bytes)
    block = max(limits.KV_BLOCK_BYTES // position_bytes // limits.KV_PAGE, 1) * limits.KV_PAGE
    pieces = max(asked.stream_depth, 2) + 2
    least_workspace = sizes.workspace_bytes(config, manifest, context, chunk, asked.draws)
    # One layer's cache at a time is read in the dtype of the products.
    plain_bytes = 2 * max(heads * width for heads, width in shapes) * sizes.itemsize(config)
    converted = position_bytes != plain_bytes or config.kv_dtype == "q8_0"
    workspace = least_workspace
    if converted:
        workspace += plain_bytes * max(kv_tokens and min(kv_tokens, (max_batch or 1) * context), *slots, 0)
    if max_batch:
        # The gathered pages of one layer with a copy, and the logits of every sequence in a few forms.
        workspace += 2 * min(kv_tokens, max_batch * context) * position_bytes
        workspace += 4 * max_batch * config.vocab_size * 4 if asked.draws else 0
    # The shuttle's pieces come in another order; what was seen of a long cache waits in float32 for the rest.
    copied = min(max(slots), block) * (position_bytes + (plain_bytes if converted else 0))
    waiting = 12 * chunk * config.n_heads * config.head_dim if max(slots) > block else 0
    return Cache(
        slots=slots,
        nbytes=sum((kv_tokens or count) * nbytes for count, nbytes in zip(slots, row_bytes, strict=True)),
        block=block,
        pieces=pieces,
        passing_bytes=_pieces_positions(slots, block, pieces) * position_bytes,
        workspace_bytes=workspace,
        shuttled_workspace_bytes=least_workspace + copied + waiting,
    )


def kv_positions(max_batch: int | None, kv_tokens: int | None, context: int) -> int:
    """Positions of the paged cache, in whole pages; 0 without a batch."""
    if max_batch is None:
        return 0
    if max_batch < 1:
        raise PlanError(f"max_batch must be at least 1, got {max_batch}")
    whole = -(-context // limits.KV_PAGE) * limits.KV_PAGE
    if kv_tokens is None:
        return max_batch * whole
    if kv_tokens < whole:
        raise PlanError(
            f"kv_tokens must be at least {whole}, the context in whole pages of {limits.KV_PAGE}, got {kv_tokens}"
        )
    return -(-kv_tokens // limits.KV_PAGE) * limits.KV_PAGE


def _slots(architecture: Architecture, config: Config, layer: int, context: int, chunk: int) -> int:
    window = architecture.window(config, architecture.layer_kind(config, layer))
    # A chunk's rows are all written before it attends, so its first row still needs the window before it.
    slots = min(context, window + chunk) if window else context
    # An odd number of slots makes a GPU's attention several times slower.
    return -(-slots // limits.KV_PAGE) * limits.KV_PAGE


def _pieces_positions(kv_slots: Sequence[int], block: int, count: int) -> int:
    """Positions of the `count` largest pieces that the caches of all layers are cut into."""
    pieces = [min(block, slots - first) for slots in kv_slots for first in range(0, slots, block)]
    return sum(sorted(pieces)[-count:])
