"""The jitted pieces of a sweep. Each is made once per static shape and shared by all engines."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from airjax import layers, models, quants, sampling
from airjax.gguf import GGMLType, Layout
from airjax.models import Buffers, Config
from airjax.plan import EMBEDDING
from airjax.streaming import to_cache
from airjax.types import Array, KVCache, LayerKV, PagedKV, Tree, TreeKV

Globals = dict[str, Buffers]
GlobalLayouts = tuple[tuple[str, Layout], ...]

# Decoding on a CPU with 512-bit vectors gains 3 to 10 %; LLVM prefers half of that, and a GPU does not read it.
jit = functools.partial(jax.jit, compiler_options={"xla_cpu_prefer_vector_width": 512})

_WHOLE, _BYTES, _HEADS = PartitionSpec(), PartitionSpec(models.AXIS), PartitionSpec(None, models.AXIS)


def spread(function: Callable[..., Any], config: Config, inside: Any, outside: Any) -> Callable[..., Any]:
    """The function of one device's part on all devices of the configuration's mesh; itself without a mesh."""
    if config.mesh is None:
        return function
    # Sums over the devices are the function's own; what it returns whole is equal on all of them.
    return jax.shard_map(function, mesh=config.mesh, in_specs=inside, out_specs=outside, check_vma=False)


@functools.cache
def block_step(
    layout: Layout, config: Config, kind: str, length: int
) -> Callable[..., tuple[Array, LayerKV]]:
    """One layer with its cache on the device; the cache is donated and updated in place.

    Returns:
      jitted `(buffers, x [B, T, D], kv, positions [B, T], tree=None) -> (x, kv)`. With a `Tree` the rows form one; not
      on several devices.
    """
    architecture = models.get(config.architecture)

    def part(buffers: Buffers, x: Array, kv: KVCache, positions: Array) -> Any:
        weights = models.unpack(buffers, layout)
        return architecture.block(weights, x, kv, positions, config, kind, length)

    @functools.partial(jit, donate_argnames="kv")
    def block(buffers: Buffers, x: Array, kv: LayerKV, positions: Array, tree: Tree | None = None) -> Any:
        if tree is not None:
            x, written = part(buffers, x, TreeKV(kv, tree), positions)
            return x, written.kv
        whole = spread(part, config, (_BYTES, _WHOLE, _HEADS, _WHOLE), (_WHOLE, _HEADS))
        return whole(buffers, x, kv, positions)

    return block


@functools.cache
def paged_block_step(layout: Layout, config: Config, kind: str) -> Callable[..., tuple[Array, LayerKV]]:
    """One layer of a batch with its cache in pages, which are donated and updated in place.

    Returns:
      jitted `(buffers, x [B, T, D], pages [P, K, page, H], table [B, N], positions [B, T]) -> (x, pages)`.
    """
    architecture = models.get(config.architecture)

    def part(buffers: Buffers, x: Array, pages: LayerKV, table: Array, positions: Array) -> Any:
        weights = models.unpack(buffers, layout)
        x, kv = architecture.block(weights, x, PagedKV(pages, table), positions, config, kind, None)
        assert isinstance(kv, PagedKV)
        return x, kv.pages

    @functools.partial(jit, donate_argnames="pages")
    def block(buffers: Buffers, x: Array, pages: LayerKV, table: Array, positions: Array) -> Any:
        whole = spread(part, config, (_BYTES, _WHOLE, _HEADS, _WHOLE, _WHOLE), (_WHOLE, _HEADS))
        return whole(buffers, x, pages, table, positions)

    return block


@functools.cache
def run_step(
    blocks: tuple[tuple[Layout, str, int], ...], config: Config
) -> Callable[..., tuple[Array, list[LayerKV]]]:
    """Consecutive resident layers in one program, which a GPU replays as one graph: a call costs as much as a layer's.

    Args:
      blocks: layout, kind and length of each layer, as for `block_step`.
      config: of the model.

    Returns:
      jitted `([buffers], x [B, T, D], [kv], positions [B, T]) -> (x, [kv])`; the caches are donated.
    """
    architecture = models.get(config.architecture)

    @functools.partial(jit, donate_argnames="kvs")
    def run(
        buffers: list[Buffers], x: Array, kvs: list[LayerKV], positions: Array
    ) -> tuple[Array, list[LayerKV]]:
        written: list[Any] = []
        for (layout, kind, length), part, kv in zip(blocks, buffers, kvs, strict=True):
            weights = models.unpack(part, layout)
            x, new = architecture.block(weights, x, kv, positions, config, kind, length)
            written.append(new)
        return x, written

    return run


@functools.cache
def paged_run_step(
    blocks: tuple[tuple[Layout, str], ...], config: Config
) -> Callable[..., tuple[Array, list[LayerKV]]]:
    """`run_step` for a batch: jitted `([buffers], x [B, T, D], [pages], table, positions) -> (x, [pages])`."""
    architecture = models.get(config.architecture)

    @functools.partial(jit, donate_argnames="pages")
    def run(
        buffers: list[Buffers], x: Array, pages: list[LayerKV], table: Array, positions: Array
    ) -> tuple[Array, list[LayerKV]]:
        written = []
        for (layout, kind), part, own in zip(blocks, buffers, pages, strict=True):
            weights = models.unpack(part, layout)
            x, kv = architecture.block(weights, x, PagedKV(own, table), positions, config, kind, None)
            assert isinstance(kv, PagedKV)
            written.append(kv.pages)
        return x, written

    return run


@functools.cache
def shuttled_block_step(layout: Layout, config: Config, kind: str) -> Callable[..., tuple[Array, LayerKV]]:
    """One layer whose cache was uploaded for this sweep; only the new rows come back.

    Returns:
      jitted `(buffers, x [B, T, D], piece uint8 [S, row bytes], positions [B, T], tree=None) -> (x, rows
      [B, K, T, H])`. With a `Tree` the rows form one.
    """
    architecture = models.get(config.architecture)

    @jit
    def block(
        buffers: Buffers, x: Array, piece: Array, positions: Array, tree: Tree | None = None
    ) -> tuple[Array, LayerKV]:
        weights = models.unpack(buffers, layout)
        kv = to_cache(piece, shuttled_row(config, len(x)))
        cache: KVCache = kv if tree is None else TreeKV(kv, tree)
        x, written = architecture.block(weights, x, cache, positions, config, kind, kv.k.shape[2])
        rows = written.kv if isinstance(written, TreeKV) else written
        assert isinstance(rows, LayerKV)
        return x, layers.read_rows(rows, positions if tree is None else tree.slots)

    return block


def shuttled_row(config: Config, batch: int) -> Any:
    """Shapes and dtypes `[B, K, H]` of the keys of one position, as the shuttle takes them."""
    return layers.rows_struct((batch, config.n_kv_heads, config.head_dim), config.kv_dtype)


@functools.cache
def embed_step(layouts: GlobalLayouts, config: Config) -> Callable[..., Array]:
    """jitted `(globals, ids [B, T]) -> x [B, T, D]`."""
    architecture = models.get(config.architecture)

    @jit
    def embed(buffers: Globals, ids: Array) -> Array:
        return architecture.embed(unpack_globals(buffers, layouts), ids, config)

    return embed


@functools.cache
def host_embed_step(type: GGMLType, config: Config) -> Callable[..., Array]:
    """jitted `(rows of the embedding as they lie in the file, uint8 [B, T, row bytes]) -> x [B, T, D]`."""
    architecture = models.get(config.architecture)

    @jit
    def embed(rows: Array) -> Array:
        batch, new, _ = rows.shape
        table = quants.view(rows.reshape(-1), type, (batch * new, config.d_model))
        ids = jnp.arange(batch * new, dtype=jnp.int32).reshape(batch, new)
        return architecture.embed({EMBEDDING: table}, ids, config)

    return embed


@functools.cache
def unembed_step(layouts: GlobalLayouts, config: Config) -> Callable[..., Array]:
    """jitted `(globals, x [..., D]) -> logits [..., V]`."""
    architecture = models.get(config.architecture)

    @jit
    def unembed(buffers: Globals, x: Array) -> Array:
        return architecture.unembed(unpack_globals(buffers, layouts), x, config)

    return unembed


@functools.cache
def draw_step(layouts: GlobalLayouts, config: Config, apply: Any, second: bool = False) -> Callable[..., Any]:
    """From the hidden states of a sweep to the next token of each sequence, and its embedding.

    Returns:
      jitted `(globals, x [B, T, D], row [B], sampler_state, token [B], keys [B], (count, positions), allowed) ->
      (token [B], logprob [B], sampler_state, x [B, 1, D], (count, positions))`. The count-th draw of a sequence uses
      its key folded with `count`. The numbers come back one higher, for the next sweep and draw: from the host they
      would wait behind the layers on the link. `allowed` is None or packed bits `[B, W]`. The log-probability is the
      model's own, before mask and sampler. A token is -1 where nothing can be drawn. The last x is None where the
      embedding stays on the host. With `second` a sixth result is the token `[B]` that comes next: that of the same
      draw without the first, or where the sampler allows no other the next most probable one.
    """
    architecture = models.get(config.architecture)

    @jit
    def draw(
        buffers: Globals,
        x: Array,
        row: Array,
        state: Any,
        token: Array,
        keys: Array,
        numbers: tuple[Array, Array],
        allowed: Array | None,
    ) -> Any:
        weights = unpack_globals(buffers, layouts)
        last = jnp.take_along_axis(x, row[:, None, None], axis=1)[:, 0]  # [B, D]
        logits = architecture.unembed(weights, last, config)  # [B, V]
        masked = logits if allowed is None else sampling.mask_tokens(logits, allowed)
        filtered, state = apply(masked, state, token)
        keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, numbers[0])
        drawn = sampling.draw(filtered, keys)
        out = (
            drawn,
            sampling.log_prob(logits, drawn),
            state,
            architecture.embed(weights, drawn[:, None], config) if EMBEDDING in weights else None,
            jax.tree.map(lambda number: number + 1, numbers),
        )
        return (*out, _second(logits, filtered, drawn, keys)) if second else out

    return draw


def _second(logits: Array, filtered: Array, drawn: Array, keys: Array) -> Array:
    """The draw `[B]` that there would be without the one that there was."""
    first = jnp.arange(logits.shape[1]) == drawn[:, None]
    again = sampling.draw(jnp.where(first, -jnp.inf, filtered), keys)
    return jnp.where(again < 0, jnp.argmax(jnp.where(first, -jnp.inf, logits), axis=1), again).astype(
        jnp.int32
    )


@functools.cache
def draw_rows_step(layouts: GlobalLayouts, config: Config, apply: Any, top: int) -> Callable[..., Any]:
    """From the hidden states of one call of a batch to the next token of each of its sequences.

    Args:
      layouts: of the globals.
      config: of the model.
      apply: of the sampler.
      top: how many of the most probable tokens to give.

    Returns:
      jitted `(globals, x [B, T, D], row [B], slot [B], sampler_state, token [B], keys [Slots], count [B], allowed) ->
      ((token [B], logprob [B], top ids [B, top], their logprobs, entropy [B]), sampler_state)`. The state has a row
      per slot and is donated. `allowed` is None or packed bits `[B, W]`. A token is -1 where nothing can be drawn. The
      entropy is the model's own, 0 where `top` is 0. The draws of a sequence are those of `draw_step`.
    """
    architecture = models.get(config.architecture)

    @functools.partial(jit, donate_argnames="state")
    def draw(
        buffers: Globals,
        x: Array,
        row: Array,
        slot: Array,
        state: Any,
        token: Array,
        keys: Array,
        count: Array,
        allowed: Array | None,
    ) -> Any:
        weights = unpack_globals(buffers, layouts)
        last = jnp.take_along_axis(x, row[:, None, None], axis=1)[:, 0]  # [B, D]
        logits = architecture.unembed(weights, last, config)  # [B, V]
        own = jax.nn.log_softmax(logits)
        masked = logits if allowed is None else sampling.mask_tokens(logits, allowed)
        filtered, rows = apply(masked, jax.tree.map(lambda leaf: leaf[slot], state), token)
        drawn = sampling.draw(filtered, jax.vmap(jax.random.fold_in)(keys[slot], count))
        top_logprobs, top_ids = jax.lax.top_k(own, top)
        logprob = jnp.take_along_axis(own, jnp.maximum(drawn, 0)[:, None], axis=1)[:, 0]
        entropy = jnp.zeros(len(own))
        if top:
            entropy = -jnp.sum(jnp.where(own > -jnp.inf, jnp.exp(own) * own, 0.0), axis=1)
        # A row without a draw keeps its state as it was, so that the draw can be replayed for the error message.
        to = jnp.where(drawn < 0, len(keys), slot)
        state = jax.tree.map(lambda leaf, new: leaf.at[to].set(new, mode="drop"), state, rows)
        return (drawn, logprob, top_ids, top_logprobs, entropy), state

    return draw


@functools.cache
def top_step(layouts: GlobalLayouts, config: Config, top: int) -> Callable[..., tuple[Array, Array, Array]]:
    """The most probable next tokens.

    Returns:
      jitted `(globals, x [B, 1, D]) -> (ids [B, top], logprobs [B, top], entropy [B])`.
    """
    architecture = models.get(config.architecture)

    @jit
    def best(buffers: Globals, x: Array) -> tuple[Array, Array, Array]:
        own = jax.nn.log_softmax(architecture.unembed(unpack_globals(buffers, layouts), x[:, 0], config))
        entropy = -jnp.sum(jnp.where(own > -jnp.inf, jnp.exp(own) * own, 0.0), axis=-1)
        logprobs, ids = jax.lax.top_k(own, top)
        return ids, logprobs, entropy

    return best


@jax.jit
def sum_rows(x: Array, positions: Array) -> Array:
    """The sum of the rows of each sequence `[B, D]`, float32, of `x [B, T, D]` but for padding."""
    return jnp.sum(jnp.where(positions[..., None] < 0, 0.0, x.astype(jnp.float32)), axis=1)


@functools.partial(jax.jit, static_argnames="spare")
def next_rows(drawn: Array, rows: Any, positions: Array, spare: int) -> tuple[Array, Any, Array]:
    """What the next decoding call of the same sequences takes, once their tokens are drawn and before they are read.

    Args:
      drawn: `[B]`.
      rows: last position, slot, last token and draws so far of each row, `[B]` each, as a tuple of any kind.
      positions: `[B, T]` of the call before, negative for padding.
      spare: slot of rows that draw for nobody; it is also for those that could not draw.

    Returns:
      ids `[B, 1]`, rows, and positions `[B, 1]`.
    """
    last, slots, tokens, counts = rows
    could = drawn >= 0
    after = (
        jnp.zeros_like(last),
        jnp.where(could, slots, spare),
        jnp.where(could, drawn, tokens),
        counts + 1,
    )
    past = jnp.max(positions, axis=1, keepdims=True)
    return jnp.maximum(drawn, 0)[:, None], after, jnp.where(past < 0, past, past + 1)


@functools.partial(jax.jit, donate_argnames="state")
def put_row(state: Any, row: Any, slot: Array) -> Any:
    """Puts one sequence's row, with a leading axis of 1, into a pytree with a row per slot, which is donated."""
    return jax.tree.map(lambda leaf, new: leaf.at[slot].set(new[0]), state, row)


def unpack_globals(buffers: Globals, layouts: GlobalLayouts) -> models.Weights:
    weights: dict[str, Any] = {}
    for name, layout in layouts:
        weights |= models.unpack(buffers[name], layout)
    return weights
