"""The jitted pieces of a sweep. Each is made once per static shape and shared by all engines."""

from __future__ import annotations

import collections
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from airjax import layers, models, quants, sampling
from airjax.gguf import GGMLType, Layout
from airjax.models import BY_HEADS, BYTES, WHOLE, Buffers, Config, spread
from airjax.plan import TABLES
from airjax.streaming import to_cache
from airjax.types import Array, KVCache, LayerKV, PagedKV, Tree, TreeKV

Globals = dict[str, Buffers]
GlobalLayouts = tuple[tuple[str, Layout], ...]

# Decoding on a CPU with 512-bit vectors gains 3 to 10 %; LLVM prefers half of that, and a GPU does not read it.
jit = functools.partial(jax.jit, compiler_options={"xla_cpu_prefer_vector_width": 512})


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
        weights = models.unpack(buffers, layout, config.decodes)
        return architecture.block(weights, x, kv, positions, config, kind, length)

    @functools.partial(jit, donate_argnames="kv")
    def block(buffers: Buffers, x: Array, kv: LayerKV, positions: Array, tree: Tree | None = None) -> Any:
        if tree is not None:
            x, written = part(buffers, x, TreeKV(kv, tree), positions)
            return x, written.kv
        whole = spread(part, config.mesh, (BYTES, WHOLE, BY_HEADS, WHOLE), (WHOLE, BY_HEADS))
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
        weights = models.unpack(buffers, layout, config.decodes)
        x, kv = architecture.block(weights, x, PagedKV(pages, table), positions, config, kind, None)
        assert isinstance(kv, PagedKV)
        return x, kv.pages

    @functools.partial(jit, donate_argnames="pages")
    def block(buffers: Buffers, x: Array, pages: LayerKV, table: Array, positions: Array) -> Any:
        whole = spread(part, config.mesh, (BYTES, WHOLE, BY_HEADS, WHOLE, WHOLE), (WHOLE, BY_HEADS))
        return whole(buffers, x, pages, table, positions)

    return block


@functools.cache
def run_step(
    blocks: tuple[tuple[Layout, str, int, int], ...], config: Config
) -> Callable[..., tuple[Array, list[LayerKV]]]:
    """Consecutive resident layers in one program, which a GPU replays as one graph: a call costs as much as a layer's.

    Args:
      blocks: layout, kind and length of each layer, as for `block_step`, and which of the caches it reads.
      config: of the model.

    Returns:
      jitted `([buffers], x [B, T, D], [kv], positions [B, T]) -> (x, [kv])`; x and the caches are donated: a graph
      whose arguments lie where they lay is replayed as it is, one with others is first written anew by the host.
    """
    parts = _layers(blocks, config)

    @functools.partial(jit, donate_argnames=("x", "kvs"))
    def run(buffers: list[Buffers], x: Array, kvs: list[LayerKV], positions: Array) -> Any:
        whole = spread(parts, config.mesh, (BYTES, WHOLE, BY_HEADS, WHOLE), (WHOLE, BY_HEADS))
        return whole(buffers, x, kvs, positions)

    return run


def _layers(blocks: tuple[tuple[Layout, str, int, int], ...], config: Config) -> Callable[..., Any]:
    """What `run_step` computes."""
    architecture = models.get(config.architecture)

    def parts(buffers: list[Buffers], x: Array, kvs: list[LayerKV], positions: Array) -> Any:
        written: list[Any] = list(kvs)
        for (layout, kind, length, at), part in zip(blocks, buffers, strict=True):
            weights = models.unpack(part, layout, config.decodes)
            x, written[at] = architecture.block(weights, x, written[at], positions, config, kind, length)
        return x, written

    return parts


class Drawn(NamedTuple):
    """What goes from one draw of a sequence to the next, on the device.

    Attributes:
      x: hidden states to draw from, `[1, 1, D]`.
      sampler: its state.
      token: the last one, `[1]`.
      numbers: of draws, and the token's position `[1, 1]`.
    """

    x: Array
    sampler: Any
    token: Array
    numbers: tuple[Array, Array]


@functools.cache
def several_step(
    blocks: tuple[tuple[Layout, str, int, int], ...],
    layouts: GlobalLayouts,
    config: Config,
    apply: Any,
    count: int,
) -> Callable[..., Any]:
    """So many draws of one sequence, each with the sweep of its token behind it, in one call: a loop on the device.

    Args:
      blocks: all layers, as `run_step` takes them.
      layouts: of the globals, the embedding among them.
      config: of the model.
      apply: of the sampler.
      count: of draws.

    Returns:
      jitted `(globals, [buffers], Drawn, row [1], keys [1], [kv]) -> ((token [count, 1], logprob [count, 1], hidden
      states drawn from [count, 1, 1, D]), Drawn, [kv])`; the caches are donated. A draw that could not be made is -1,
      and nothing after it counts.
    """
    drawing, parts = _drawing(layouts, config, apply), _layers(blocks, config)

    @functools.partial(jit, donate_argnames="kvs")
    def several(
        buffers: Globals, layers: list[Buffers], begin: Drawn, row: Array, keys: Array, kvs: list[LayerKV]
    ) -> Any:
        def one(carry: tuple[Drawn, list[LayerKV]], _: None) -> Any:
            last, kvs = carry
            token, logprob, sampler, x, numbers = drawing(
                buffers, last.x, row, last.sampler, last.token, keys, last.numbers, None
            )
            x, kvs = parts(layers, x, kvs, numbers[1])
            return (Drawn(x, sampler, token, numbers), kvs), (token, logprob, last.x)

        (end, kvs), drawn = jax.lax.scan(one, (begin, kvs), None, length=count)
        return drawn, end, kvs

    return several


def graph_of(run: range) -> int:
    """Which graph a run of layers replays, for steps that are made for each graph anew.

    A program has one graph, and runs of the same form that share the program write it in turn for their own weights,
    which takes the host longer than the device on slow cores. Each has one of its own where programs are kept on disk,
    so that only the first is compiled.
    """
    return run.start if jax.config.values["jax_compilation_cache_dir"] else 0


@functools.cache
def paged_run_step(
    blocks: tuple[tuple[Layout, str, int], ...], config: Config, graph: int = 0
) -> Callable[..., tuple[Array, list[LayerKV]]]:
    """`run_step` for a batch: jitted `([buffers], x [B, T, D], [pages], table, positions) -> (x, [pages])`.

    `graph` is from `graph_of`.
    """
    architecture = models.get(config.architecture)

    def parts(buffers: list[Buffers], x: Array, pages: list[LayerKV], table: Array, positions: Array) -> Any:
        written = list(pages)
        for (layout, kind, at), part in zip(blocks, buffers, strict=True):
            weights = models.unpack(part, layout, config.decodes)
            x, kv = architecture.block(weights, x, PagedKV(written[at], table), positions, config, kind, None)
            assert isinstance(kv, PagedKV)
            written[at] = kv.pages
        return x, written

    @functools.partial(jit, donate_argnames="pages")
    def run(buffers: list[Buffers], x: Array, pages: list[LayerKV], table: Array, positions: Array) -> Any:
        whole = spread(parts, config.mesh, (BYTES, WHOLE, BY_HEADS, WHOLE, WHOLE), (WHOLE, BY_HEADS))
        return whole(buffers, x, pages, table, positions)

    return run


@functools.cache
def shuttled_block_step(layout: Layout, config: Config, kind: str) -> Callable[..., tuple[Array, LayerKV]]:
    """One layer whose cache was uploaded for this sweep; only the new rows come back.

    Returns:
      jitted `(buffers, x [B, T, D], piece uint8 [S, row bytes], positions [B, T], tree=None) -> (x, rows
      [B, K, T, H])`. With a `Tree` the rows form one.
    """
    architecture = models.get(config.architecture)

    def part(buffers: Buffers, x: Array, piece: Array, positions: Array, tree: Tree | None = None) -> Any:
        weights = models.unpack(buffers, layout, config.decodes)
        kv = to_cache(piece, shuttled_row(config, kind, len(x)))
        cache: KVCache = kv if tree is None else TreeKV(kv, tree)
        x, written = architecture.block(weights, x, cache, positions, config, kind, kv.k.shape[2])
        rows = written.kv if isinstance(written, TreeKV) else written
        assert isinstance(rows, LayerKV)
        return x, layers.read_rows(rows, positions if tree is None else tree.slots)

    @jit
    def block(buffers: Buffers, x: Array, piece: Array, positions: Array, tree: Tree | None = None) -> Any:
        if tree is not None:
            return part(buffers, x, piece, positions, tree)
        whole = spread(part, config.mesh, (BYTES, WHOLE, BYTES, WHOLE), (WHOLE, BY_HEADS))
        return whole(buffers, x, piece, positions)

    return block


def shuttled_row(config: Config, kind: str, batch: int) -> Any:
    """Shapes and dtypes `[B, K, H]` of the keys of one position of a kind of layer, as the shuttle takes them."""
    return layers.rows_struct((batch, *config.kv_shape(kind)), config.kv_dtype)


def buffer_structs(layout: Layout, shards: int = 1) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Shapes and dtypes of a span's flat buffers, of so many devices together."""
    return tuple(jax.ShapeDtypeStruct((nbytes * shards,), jnp.uint8) for nbytes in layout.sizes)


@functools.cache
def read_by_embedding(layouts: GlobalLayouts, config: Config) -> frozenset[str]:
    """Which of the global tensors `embed_step` reads."""
    read: set[str] = set()

    class Seen(collections.UserDict[str, Any]):
        def __getitem__(self, name: str) -> Any:
            read.add(name)
            return super().__getitem__(name)

    def embed(buffers: Globals, ids: Array) -> Array:
        weights = Seen(unpack_globals(buffers, layouts))
        return models.get(config.architecture).embed(weights, ids, config)

    buffers = {name: buffer_structs(layout) for name, layout in layouts}
    jax.eval_shape(embed, buffers, jax.ShapeDtypeStruct((1, 1), jnp.int32))
    return frozenset(read)


@functools.cache
def embed_step(layouts: GlobalLayouts, config: Config) -> Callable[..., Array]:
    """jitted `(globals, ids [B, T]) -> x [B, T, W]`."""
    architecture = models.get(config.architecture)

    @jit
    def embed(buffers: Globals, ids: Array) -> Array:
        return architecture.embed(unpack_globals(buffers, layouts), ids, config)

    return embed


@functools.cache
def host_embed_step(
    layouts: GlobalLayouts, tables: tuple[tuple[str, GGMLType, int], ...], config: Config
) -> Callable[..., Array]:
    """`embed_step` with tables that stay on the host, by name, block type and width.

    Returns:
      jitted `(globals, ids [B, T], [rows as they lie in the file, uint8 [B, T, row bytes]]) -> x [B, T, W]`; ids may be
      None where all tables are on the host.
    """
    architecture = models.get(config.architecture)

    @jit
    def embed(buffers: Globals, ids: Array | None, rows: list[Array]) -> Array:
        weights = dict(unpack_globals(buffers, layouts))
        ids = jnp.zeros(rows[0].shape[:2], jnp.int32) if ids is None else ids
        for (name, type, width), own in zip(tables, rows, strict=True):
            weights[name] = quants.TakenRows(quants.QTensor(own, type, (*ids.shape, width)))
        return architecture.embed(weights, ids, config)

    return embed


@functools.cache
def unembed_step(layouts: GlobalLayouts, config: Config) -> Callable[..., Array]:
    """jitted `(globals, x [..., D]) -> logits [..., V]`."""

    @jit
    def unembed(buffers: Globals, x: Array) -> Array:
        return logits_of(buffers, layouts, x, config)

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
    return jit(_drawing(layouts, config, apply, second))


@functools.cache
def draw_in_place_step(layouts: GlobalLayouts, config: Config, apply: Any) -> Callable[..., Any]:
    """`draw_step` from a single row `[B, 1, D]`, with an embedding on the device: x and the numbers are donated.

    So the new ones lie where the old ones lay, and a GPU replays the next sweep's graph as it is.

    Returns:
      as `draw_step`, jitted, and as the last output the hidden states drawn from, `[B, 1, D]`.
    """
    drawing = _drawing(layouts, config, apply)

    @functools.partial(jit, donate_argnames=("x", "numbers"))
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
        return (*drawing(buffers, x, row, state, token, keys, numbers, allowed), x)

    return draw


def _drawing(layouts: GlobalLayouts, config: Config, apply: Any, second: bool = False) -> Callable[..., Any]:
    architecture = models.get(config.architecture)
    needed = architecture.global_specs(config)
    here = {name for name, _ in layouts}
    embeds = all(name in here for name in TABLES if name in needed)

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
        logits = logits_of(buffers, layouts, last, config)  # [B, V]
        masked = logits if allowed is None else sampling.mask_tokens(logits, allowed)
        filtered, state = apply(masked, state, token)
        keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, numbers[0])
        drawn = sampling.draw(filtered, keys)
        out = (
            drawn,
            sampling.log_prob(logits, drawn),
            state,
            architecture.embed(weights, drawn[:, None], config) if embeds else None,
            jax.tree.map(lambda number: number + 1, numbers),
        )
        return (*out, _second(logits, filtered, drawn, keys)) if second else out

    return draw


@functools.partial(jax.jit, static_argnames="rows")
def last_rows(
    x: Array, last: Array, slots: Array, tokens: Array, counts: Array, rows: int, spare: int
) -> Any:
    """One position of each sequence of a call of prompts, in the form of a decoding call of `rows` sequences.

    So the draws, whose program is large, are compiled for decoding calls alone.

    Args:
      x: `[B, T, D]`.
      last: `[B]`, the position.
      slots: `[B]`, with the two that follow, as `draw_rows_step` takes them; as many rows as are missing are added.
      tokens: `[B]`.
      counts: `[B]`.
      rows: at least B.
      spare: slot of the added rows.

    Returns:
      `x [rows, 1, D]`, zeros `[rows]`, slots, tokens, counts.
    """
    taken = jnp.take_along_axis(x, last[:, None, None], axis=1)  # [B, 1, D]
    missing = rows - len(x)
    return (
        jnp.pad(taken, ((0, missing), (0, 0), (0, 0))),
        jnp.zeros(rows, jnp.int32),
        jnp.pad(slots, (0, missing), constant_values=spare),
        jnp.pad(tokens, (0, missing), constant_values=-1),
        jnp.pad(counts, (0, missing)),
    )


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
        logits = _row_logits(buffers, layouts, config, x, row)
        masked = logits if allowed is None else sampling.mask_tokens(logits, allowed)
        filtered, rows = apply(masked, jax.tree.map(lambda leaf: leaf[slot], state), token)
        drawn = sampling.draw(filtered, jax.vmap(jax.random.fold_in)(keys[slot], count))
        # A row without a draw keeps its state as it was, so that the draw can be replayed for the error message.
        to = jnp.where(drawn < 0, len(keys), slot)
        state = jax.tree.map(lambda leaf, new: leaf.at[to].set(new, mode="drop"), state, rows)
        return _told(logits, drawn, top), state

    return draw


@functools.cache
def scaled_rows_step(layouts: GlobalLayouts, config: Config, top: int) -> Callable[..., Any]:
    """`draw_rows_step` for sequences whose samplers have a temperature and nothing else: the same tokens.

    A sampler asks the device what of it is on; on a GPU the host waits for each such answer, and could not dispatch
    the next sweep before this one has ended.

    Returns:
      jitted `(globals, x [B, T, D], row [B], slot [B], temperatures [Slots], keys [Slots], count [B], allowed) ->
      (token [B], logprob [B], top ids [B, top], their logprobs, entropy [B])`.
    """

    @jit
    def draw(
        buffers: Globals,
        x: Array,
        row: Array,
        slot: Array,
        temperatures: Array,
        keys: Array,
        count: Array,
        allowed: Array | None,
    ) -> Any:
        logits = _row_logits(buffers, layouts, config, x, row)
        masked = logits if allowed is None else sampling.mask_tokens(logits, allowed)
        scaled = sampling.scale(masked, temperatures[slot])
        drawn = sampling.draw(scaled, jax.vmap(jax.random.fold_in)(keys[slot], count))
        return _told(logits, drawn, top)

    return draw


def _row_logits(buffers: Globals, layouts: GlobalLayouts, config: Config, x: Array, row: Array) -> Array:
    """Logits `[B, V]` of one position of each sequence."""
    last = jnp.take_along_axis(x, row[:, None, None], axis=1)[:, 0]  # [B, D]
    return logits_of(buffers, layouts, last, config)


def _told(logits: Array, drawn: Array, top: int) -> tuple[Array, ...]:
    """Tokens `[B]`, their log-probabilities, the `top` most probable `[B, top]` and theirs, the entropy `[B]`."""
    own = jax.nn.log_softmax(logits)
    top_logprobs, top_ids = jax.lax.top_k(own, top)
    logprob = jnp.take_along_axis(own, jnp.maximum(drawn, 0)[:, None], axis=1)[:, 0]
    entropy = jnp.zeros(len(own))
    if top:
        entropy = -jnp.sum(jnp.where(own > -jnp.inf, jnp.exp(own) * own, 0.0), axis=1)
    return drawn, logprob, top_ids, top_logprobs, entropy


@functools.cache
def top_step(layouts: GlobalLayouts, config: Config, top: int) -> Callable[..., tuple[Array, Array, Array]]:
    """The most probable next tokens.

    Returns:
      jitted `(globals, x [B, 1, D]) -> (ids [B, top], logprobs [B, top], entropy [B])`.
    """

    @jit
    def best(buffers: Globals, x: Array) -> tuple[Array, Array, Array]:
        own = jax.nn.log_softmax(logits_of(buffers, layouts, x[:, 0], config))
        entropy = -jnp.sum(jnp.where(own > -jnp.inf, jnp.exp(own) * own, 0.0), axis=-1)
        logprobs, ids = jax.lax.top_k(own, top)
        return ids, logprobs, entropy

    return best


@functools.cache
def sum_step(layouts: GlobalLayouts, config: Config) -> Callable[..., Array]:
    """jitted `(globals, x [B, T, W], positions [B, T]) -> [B, D]`: the sum of each sequence's rows but for padding."""
    architecture = models.get(config.architecture)

    @jax.jit
    def total(buffers: Globals, x: Array, positions: Array) -> Array:
        rows = architecture.gathered(unpack_globals(buffers, layouts), x, config)
        return jnp.sum(jnp.where(positions[..., None] < 0, 0.0, rows.astype(jnp.float32)), axis=1)

    return total


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


def pack_row(row: Any) -> np.ndarray:
    """A pytree of `[1, ...]` arrays on the host as bytes, one after another: one transfer instead of one for each."""
    leaves = [np.ascontiguousarray(leaf) for leaf in jax.tree.leaves(row)]
    return np.concatenate([leaf.reshape(-1).view(np.uint8) for leaf in leaves])


@functools.partial(jax.jit, donate_argnames="state")
def put_row(state: Any, packed: Array, slot: Array) -> Any:
    """Puts what `pack_row` gave into a pytree with a row per slot, which is donated."""
    leaves, tree = jax.tree.flatten(state)
    new, offset = [], 0
    for leaf in leaves:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            bits = jax.random.key_data(leaf)
            own, offset = _taken(packed, offset, bits)
            new.append(leaf.at[slot].set(jax.random.wrap_key_data(own, impl=jax.random.key_impl(leaf))))
        else:
            own, offset = _taken(packed, offset, leaf)
            new.append(leaf.at[slot].set(own))
    return jax.tree.unflatten(tree, new)


def _taken(packed: Array, offset: int, like: Array) -> tuple[Array, int]:
    """A row of the form of those of `like`, from its bytes; and where the next one begins."""
    shape, dtype = like.shape[1:], like.dtype
    nbytes = math.prod(shape) * dtype.itemsize
    part = packed[offset : offset + nbytes]
    if jnp.issubdtype(dtype, jnp.bool_):
        return part.reshape(shape).astype(bool), offset + nbytes
    cells = (-1,) if dtype.itemsize == 1 else (-1, dtype.itemsize)
    return jax.lax.bitcast_convert_type(part.reshape(cells), dtype).reshape(shape), offset + nbytes


def logits_of(buffers: Globals, layouts: GlobalLayouts, x: Array, config: Config) -> Array:
    """Hidden states `[..., D]` to logits `[..., V]`: each device makes those of its part of the vocabulary."""
    architecture = models.get(config.architecture)
    cut = config.mesh is not None and any(
        name in models.VOCABULARY_CUT and layout.tensors[0][1].shape[0] < config.vocab_size
        for name, layout in layouts
    )

    def logits(buffers: Globals, x: Array) -> Array:
        part: Array = architecture.unembed(unpack_globals(buffers, layouts), x, config)
        return jax.lax.all_gather(part, models.AXIS, axis=part.ndim - 1, tiled=True) if cut else part

    lie = {name: BYTES if cut and name in models.VOCABULARY_CUT else WHOLE for name, _ in layouts}
    return spread(logits, config.mesh, (lie, WHOLE), WHOLE)(buffers, x)


def unpack_globals(buffers: Globals, layouts: GlobalLayouts) -> models.Weights:
    weights: dict[str, Any] = {}
    for name, layout in layouts:
        weights |= models.unpack(buffers[name], layout)
    return weights
