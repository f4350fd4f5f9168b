"""Bytes of spans and of what the steps need beside them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from airjax import layers, models, quants
from airjax.gguf import Manifest, Span
from airjax.models import Config
from airjax.plan import limits


def itemsize(config: Config) -> int:
    return np.dtype(config.compute_dtype).itemsize if config.compute_dtype != "bfloat16" else 2


def device_globals(manifest: Manifest) -> Sequence[Span]:
    return [
        span
        for name, span in manifest.globals.items()
        if name.removesuffix(".weight") not in models.ROPE_DIVISORS
    ]


def passing(span: Span) -> dict[int, int]:
    """Bytes of what passes through the ring of a layer: its pieces by number, or all of it as one."""
    layout = span.layout
    return {at: layout.sizes[at] for at in layout.pieces} if layout.pieces else {0: span.nbytes}


def small_bytes(span: Span) -> int:
    """Bytes of a streamed layer that stay on the device: those between its pieces."""
    return span.nbytes - sum(passing(span).values())


def largest(passing: Sequence[dict[int, int]]) -> int:
    return max((max(own.values()) for own in passing), default=0)


def slots_bytes(passing: Sequence[dict[int, int]], depth: int) -> int:
    """Of a ring for these layers."""
    return min(depth, sum(map(len, passing))) * largest(passing)


def relaid_bytes(span: Span) -> int:
    """Bytes of a span whose matrices are re-laid for the fused kernels, at worst 2.8 % larger."""
    sizes = (
        quants.packed_bytes(slot.type, slot.shape) if quants.packable(slot.type, slot.shape) else slot.nbytes
        for _, slot in span.layout.tensors
    )
    return max(sum(sizes), span.nbytes)


def decoded_bytes(config: Config) -> float:
    """Workspace bytes of a decoded weight."""
    # A GPU holds one decoded matrix at a time, and a little beside it: an H100's peaks of 4.68 GiB (8B) and 18.98
    # (70B) are then planned as 4.80 and 19.15. XLA's CPU backend, where float32 is the default, holds several.
    return itemsize(config) * (4.0 if config.compute_dtype == "float32" else 1.25)


def workspace_bytes(config: Config, manifest: Manifest, context: int, chunk: int, draws: bool) -> int:
    """What the largest step takes: attention, the feed-forward part or the logits; they come one after another."""
    item_bytes, d, f, wide = itemsize(config), config.d_model, config.d_ff, config.n_heads * config.head_dim
    decoded = decoded_bytes(config)
    # Attention keeps its score tile below a limit of its own; two live at once, and no decoded matrix beside them.
    scores = 2 * min(config.n_heads * chunk * context * 4, layers.SCORES_BYTES)
    attention = max(scores, decoded * max(_tile(wide, d), _tile(d, wide))) + 4 * chunk * 4 * (d + wide)
    experts, feed_forward = config.experts, 0.0
    if experts is None or not all(experts.in_layer(layer) for layer in range(config.n_layers)):
        # The hidden states in a few forms; of gate and up, whose tiles share the limit of one, only what they make.
        cut = any(span.layout.pieces for span in manifest.layers)
        whole = config.whole_gates or cut or chunk <= quants.MOST_ROWS
        products = 12 * f if whole else item_bytes * f + 8 * -(-f // quants.decoded_tiles(f, d, 2))
        feed_forward = chunk * (16 * d + products) + decoded * max(_tile(f, d), _tile(d, f))
    if experts is not None:
        feed_forward = max(feed_forward, experts_workspace(config, chunk, decoded))
    logits = 2 * item_bytes * _tile(config.vocab_size, d) + 3 * max(
        config.vocab_size * 4, limits.LOGIT_ROWS_BYTES
    )
    logits = logits if draws else 0
    # What is passed on beside the hidden states: what a step takes and gives, the one before, and one being made.
    passed_on = 4 * chunk * 4 * (config.width - d)
    return limits.FIXED_WORKSPACE_BYTES + int(max(attention, feed_forward, logits)) + passed_on


def experts_workspace(config: Config, chunk: int, decoded_bytes: float) -> float:
    """Of the feed-forward part: a few experts decoded and their blocks of rows, and what each made of its tokens."""
    experts, d = config.experts, config.d_model
    pairs, rows = chunk * experts.routing.used, models.block_rows(chunk)
    shared = decoded_bytes * d * experts.shared_d_ff + 16 * chunk * experts.shared_d_ff
    if experts.covered and config.compute_dtype == "bfloat16":
        # What the kernels make of each pair, half way and at the end, and the hidden states in a few forms: 208 and
        # 213 MiB for 2048 tokens of 30B-A3B and gpt-oss-120b, where XLA itself counts 184 and 182 for all of a layer.
        return pairs * (2 * experts.d_ff + 4 * d) + 14 * chunk * d + shared
    at_once = min(models.decoded_experts(config), layers.most_blocks(pairs, experts.count, rows))
    blocks = at_once * (experts.d_ff * d * (decoded_bytes + 1) + 4 * rows * (2 * d + 3 * experts.d_ff))
    # Of a few rows the blocks are gathered as they are.
    gathered = min(models.GATHERED_BYTES, 4 * 8 * experts.routing.used * experts.d_ff * d * 3)
    return max(blocks, shared, gathered) + 4 * chunk * d * (4 + 3 * experts.routing.used)


def _tile(n_out: int, n_in: int) -> int:
    """Weights of a matrix that are decoded at once."""
    return n_out * n_in // quants.decoded_tiles(n_out, n_in)
