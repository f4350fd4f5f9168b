"""The feed-forward part of a mixture of experts: router, the chosen experts' products, shared experts.

The products look at nothing but a token and its experts: wherever these lie, and in however many passes they come,
the numbers are the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from airjax import layers, quants
from airjax.gguf import GGUF, GGUFError
from airjax.models import attention_check
from airjax.models.architecture import Config, TensorSpec, Weights, project, project_many
from airjax.types import Array

ROUTER = "ffn_gate_inp"
CHOICE_BIAS = "exp_probs_b.bias"
# By the numbers that files have for them.
_SCORINGS: dict[int, layers.Scoring] = {1: "softmax", 2: "sigmoid", 3: "softmax of chosen"}
_FUNCTION_OF = {scoring: number for number, scoring in _SCORINGS.items()}
_FUSED_GATE = "ffn_gate_up_exps"
EXPERT_MATRICES = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
# All stacks that files have.
EXPERT_STACKS = (_FUSED_GATE, *EXPERT_MATRICES)
# As in `quants.matmul`: up to this many rows each goes to its experts alone.
_FEW_ROWS = 8
# With factors in float32, which the kernels take in three terms, they are faster than decoding experts and a product
# up to this many rows, and tokens of an expert on average.
_KERNEL_ROWS = 512
_KERNEL_TOKENS = 64
# Weights of experts that are decoded at once where there are more rows, and bytes that are gathered where not.
TILE_WEIGHTS = 32 << 20
GATHERED_BYTES = 128 << 20


@dataclass(frozen=True)
class Experts:
    """What a mixture of experts adds to a configuration; hashable.

    Attributes:
      count: E, routed experts of a layer.
      d_ff: F, width of each.
      routing: how a token's experts are chosen.
      shared_d_ff: width of what every token goes through beside them; 0 for none.
      shared_gate: a token's own weight for that (Qwen 2).
      activation: of the gates.
      biases: router and experts have them; they are small, and stay with the rest of the layer.
      choice_bias: the router has a bias that moves the choice but not the weights (DeepSeek-V3).
      first: so many layers before the first mixture have a plain feed-forward part.
      every: of the others each so manyth layer is a mixture (Llama 4).
      on_input: a token's weight for an expert multiplies what the expert takes, not what it gives (Llama 4).
      capability: of the CUDA device whose kernels multiply the experts; "" for XLA alone.
      covered: these kernels take all of the experts.
      fused_gate: gate and up of the experts are one stack.
      read_after: what follows the experts reads the layer's other tensors too (Gemma 4).
    """

    count: int
    d_ff: int
    routing: layers.Routing
    shared_d_ff: int = 0
    shared_gate: bool = False
    activation: layers.Activation = "silu"
    biases: bool = False
    choice_bias: bool = False
    first: int = 0
    every: int = 1
    on_input: bool = False
    capability: str = ""
    covered: bool = False
    fused_gate: bool = False
    read_after: bool = False

    def in_layer(self, layer: int) -> bool:
        """Whether a layer is a mixture."""
        return layer >= self.first and (layer + 1) % self.every == 0

    @property
    def with_layer(self) -> bool:
        """Whether the experts' products, or what follows them, read the layer's other tensors."""
        return self.biases or self.read_after


@flax.struct.dataclass
class Chosen:
    """Tokens between attention and their experts.

    Attributes:
      x: hidden states after attention, `[B, T, D]`.
      h: what the experts take, `[B, T, D]`.
      ids: `[B, T, k]` int32.
      gates: `[B, T, k]`.
      beside: what is added to the experts' sum, `[B, T, D]`, or None.
    """

    x: Array
    h: Array
    ids: Array
    gates: Array
    beside: Array | None


def read_experts(
    gguf: GGUF,
    sizes: Mapping[str, Any],
    *,
    normalized: bool,
    width: str,
    scoring: layers.Scoring = "softmax",
) -> Experts:
    """The experts of a file by the keys that most files share.

    Args:
      gguf: the open file.
      sizes: from `common_sizes`.
      normalized: whether the chosen experts' weights sum to one, where the file does not say it.
      width: key of an expert's width.
      scoring: where the file does not say it.

    Raises:
      GGUFError: a number makes no mixture of experts.
    """
    arch = sizes["architecture"]

    def key(name: str) -> int:
        value = int(gguf.get(f"{arch}.{name}", int))
        if not 0 < value < 2**31:
            raise GGUFError(
                f"{gguf.path}: {arch}.{name} must be a positive number, got {value}: convert the model again"
            )
        return value

    count, used = key("expert_count"), key("expert_used_count")
    if used > count:
        raise GGUFError(
            f"{gguf.path}: {arch}.expert_used_count must be at most expert_count, got {used} of {count}: "
            "convert the model again"
        )
    normalized = gguf.get(f"{arch}.expert_weights_norm", bool, normalized)
    scale = gguf.get(f"{arch}.expert_weights_scale", float, 1.0)
    function = gguf.get(f"{arch}.expert_gating_func", int, 0) or _FUNCTION_OF[scoring]
    if function not in _SCORINGS:
        raise GGUFError(
            f"{gguf.path}: {arch}.expert_gating_func must be 1 (softmax), 2 (sigmoid) or 3 (softmax of chosen), "
            f"got {function}"
        )
    groups = gguf.get(f"{arch}.expert_group_count", int, 0) or 1
    kept = gguf.get(f"{arch}.expert_group_used_count", int, 0) or groups
    if groups < 1 or count % groups or not 0 < kept <= groups or used > kept * (count // groups):
        raise GGUFError(
            f"{gguf.path}: {arch}.expert_group_count and expert_group_used_count must cut {count} experts in equal "
            f"groups with {used} to choose from, got {groups} and {kept}: convert the model again"
        )
    if groups > 1 and count // groups < 2:
        raise GGUFError(
            f"{gguf.path}: {arch}.expert_group_count must leave 2 experts in a group, got {groups}"
        )
    routing = layers.Routing(used, _SCORINGS[function], normalized, scale or 1.0)
    if kept < groups:
        # DeepSeek-V2, whose scores are a softmax, takes the best of a group, DeepSeek-V3 the best two.
        best = 1 if routing.scoring == "softmax" else 2
        routing = dataclasses.replace(routing, groups=groups, groups_used=kept, group_best=best)
    first = gguf.get(f"{arch}.leading_dense_block_count", int, 0)
    if not 0 <= first <= sizes["n_layers"]:
        raise GGUFError(
            f"{gguf.path}: {arch}.leading_dense_block_count must be at most block_count, got {first}"
        )
    return Experts(
        count,
        key(width),
        routing,
        choice_bias=_in_any_layer(gguf, sizes, CHOICE_BIAS),
        first=first,
        fused_gate=_in_any_layer(gguf, sizes, f"{_FUSED_GATE}.weight"),
    )


def with_kernels(config: Config, gguf: GGUF, device: jax.Device) -> Config:
    """The configuration with which kernels attend, decode matrices and multiply experts, if they are right there."""
    config = dataclasses.replace(
        config,
        attends=attention_check.usable(config, device),
        decodes=quants.decoding_usable({info.type for info in gguf.tensors.values()}, device),
    )
    if getattr(config, "experts", None) is None:
        return config
    types = {info.type for name, info in gguf.tensors.items() if name.split(".")[-2] in EXPERT_STACKS}
    capability = quants.mixture_usable(types, device)
    covered = bool(capability) and quants.covers(types, config.d_model, config.experts.d_ff)
    experts = dataclasses.replace(config.experts, capability=capability, covered=covered)
    return dataclasses.replace(config, experts=experts)


def shared_width(gguf: GGUF, experts: Experts) -> int:
    """Width of what every token goes through, by the keys that most files share; 0 for none."""
    arch = gguf.get("general.architecture", str)
    count = gguf.get(f"{arch}.expert_shared_count", int, 0)
    width = gguf.get(f"{arch}.expert_shared_feed_forward_length", int, 0) or experts.d_ff * count
    if not 0 <= width < 2**31:
        raise GGUFError(
            f"{gguf.path}: {arch}.expert_shared_feed_forward_length and expert_shared_count must make a width, "
            f"got {width}: convert the model again"
        )
    return width


def _in_any_layer(gguf: GGUF, sizes: Mapping[str, Any], name: str) -> bool:
    return any(f"blk.{layer}.{name}" in gguf.tensors for layer in range(sizes["n_layers"]))


def expert_specs(config: Config) -> dict[str, TensorSpec]:
    """The tensors of a layer's feed-forward part."""
    experts, d = config.experts, config.d_model
    shapes: dict[str, tuple[int, ...]] = {
        ROUTER: (experts.count, d),
        "ffn_down_exps": (experts.count, d, experts.d_ff),
    }
    if experts.fused_gate:
        shapes[_FUSED_GATE] = (experts.count, 2 * experts.d_ff, d)
    else:
        shapes |= {f"ffn_{part}_exps": (experts.count, experts.d_ff, d) for part in ("gate", "up")}
    if experts.shared_d_ff:
        shapes |= {"ffn_gate_shexp": (experts.shared_d_ff, d), "ffn_up_shexp": (experts.shared_d_ff, d)}
        shapes["ffn_down_shexp"] = (d, experts.shared_d_ff)
    if experts.shared_gate:
        shapes["ffn_gate_inp_shexp"] = (d,)
    specs = {f"{name}.weight": TensorSpec(shape) for name, shape in shapes.items()}
    if experts.biases:
        specs |= {f"{name}.bias": TensorSpec(shapes[name][:-1]) for name in (ROUTER, *EXPERT_MATRICES)}
    if experts.choice_bias:
        specs[CHOICE_BIAS] = TensorSpec((experts.count,))
    return specs


def shared_apart(h: Array, ids: Array, weights: Weights, config: Config) -> Array | None:
    """What every token goes through, `[B, T, D]`, by `apart`; None without."""
    if not config.experts.shared_d_ff:
        return None
    return apart(h, ids, lambda h: _shared(h, weights, config))


def apart(h: Array, ids: Array, made: Callable[[Array], Array]) -> Array:
    """`made(h)` in the program of the routed experts, whose `ids` it takes, with the numbers of one of its own."""
    # XLA's CPU backend would fuse the last factor of the shared experts with the sum, and round once less than where
    # the routed experts come through a pool, in a program of their own; into a `lax.cond` it does not fuse.
    found: Array = jax.lax.platform_dependent(
        h,
        ids,
        cpu=lambda h, ids: jax.lax.cond(ids[0, 0, 0] >= 0, made, jnp.zeros_like, h),
        default=lambda h, ids: made(h),
    )
    return found


def read_by_router(config: Config) -> tuple[str, ...]:
    """The beginnings of the names of a router's tensors, and of the norm before it."""
    return f"{ROUTER}.", CHOICE_BIAS, f"{config.feed_forward_name}."


def route(h: Array, weights: Weights, config: Config) -> tuple[Array, Array]:
    """The experts `[B, T, k]` int32 of each token and their weights `[B, T, k]`; always in float32."""
    logits = quants.matmul(h, weights[f"{ROUTER}.weight"], dtype=np.dtype(np.float32))
    if config.experts.biases:
        logits = logits + quants.dequantize(weights[f"{ROUTER}.bias"])
    bias = quants.dequantize(weights[CHOICE_BIAS]) if config.experts.choice_bias else None
    return layers.choose(logits, config.experts.routing, bias)


def _shared(h: Array, weights: Weights, config: Config) -> Array:
    experts = config.experts
    gate, up = project_many(h, weights, ("ffn_gate_shexp", "ffn_up_shexp"), config)
    down = project(layers.gated(gate, up, experts.activation), weights, "ffn_down_shexp", config)
    if not experts.shared_gate:
        return down
    own = jnp.sum(h * quants.dequantize(weights["ffn_gate_inp_shexp.weight"]), axis=-1, keepdims=True)
    return jax.nn.sigmoid(own) * down


def stacks(weights: Weights, config: Config) -> dict[str, quants.Stacked]:
    """The expert tensors of a layer, by name."""
    names = (_FUSED_GATE, EXPERT_MATRICES[2]) if config.experts.fused_gate else EXPERT_MATRICES
    return by_matrix({name: quants.stacked(weights[f"{name}.weight"]) for name in names})


def by_matrix(parts: Mapping[str, quants.Stacked]) -> dict[str, quants.Stacked]:
    """Stacks by the name of their matrix, where gate and up may be one."""
    found = dict(parts)
    if _FUSED_GATE in found:
        gate, up = quants.halves(found.pop(_FUSED_GATE))
        found |= {EXPERT_MATRICES[0]: gate, EXPERT_MATRICES[1]: up}
    return found


def biases(weights: Weights, config: Config) -> dict[str, Array]:
    """The experts' biases of a layer, by the name of their matrix: float32 `[E, n_out]`."""
    if not config.experts.biases:
        return {}
    return {name: quants.dequantize(weights[f"{name}.bias"]) for name in EXPERT_MATRICES}


def expert_products(
    h: Array,
    ids: Array,
    parts: Mapping[str, quants.Stacked],
    own_biases: Mapping[str, Array],
    slots: Array | None,
    before: Array | None,
    config: Config,
    scales: Array | None = None,
) -> Array:
    """What each chosen expert makes of its token.

    Args:
      h: `[B, T, D]`.
      ids: `[B, T, k]`.
      parts: the experts' matrices.
      own_biases: the experts' biases, from `biases`.
      slots: int32 `[E]`: where in them an expert lies, negative if it is not there; None where each has its place.
      before: `[B, T, k, D]`, what earlier passes made of experts that are not there now; None for the only pass.
      config: of the model.
      scales: `[B, T, k]`, factors of what each expert takes; None for 1.

    Returns:
      float32 `[B, T, k, D]`.
    """
    *lead, used = ids.shape
    rows = h.reshape(-1, h.shape[-1])
    pairs = ids.reshape(-1)
    out = jnp.zeros((len(pairs), rows.shape[1])) if before is None else before.reshape(len(pairs), -1)
    factors = None if scales is None else scales.reshape(-1, 1)
    product = _by_pair if len(rows) <= _FEW_ROWS else _by_expert
    if takes_kernels(len(rows), len(pairs), parts, config):
        product = _by_kernels
    return product(rows, pairs, factors, parts, own_biases, slots, out, config).reshape(*lead, used, -1)


def takes_kernels(rows: int, pairs: int, parts: Mapping[str, quants.Stacked], config: Config) -> bool:
    """Whether the fused kernels make the products of so many tokens and pairs."""
    experts = config.experts
    few = rows <= _KERNEL_ROWS and pairs <= _KERNEL_TOKENS * experts.count
    fast = few or np.dtype(config.compute_dtype) == jnp.bfloat16
    return bool(experts.capability) and fast and quants.takes(*parts.values())


def arriving_products(
    chosen: Chosen,
    parts: Mapping[str, quants.Stacked],
    own_biases: Mapping[str, Array],
    slots: Array,
    arriving: quants.Arriving,
    config: Config,
) -> tuple[Array, Array, Array]:
    """`chosen_products` by the kernels, of experts in a pool that are fetched meanwhile; see `takes_kernels`.

    Returns:
      The products `[B, T, k, D]`, the pool, and `Arriving.fetched`.
    """
    *lead, used = chosen.ids.shape
    rows, pairs = chosen.h.reshape(-1, chosen.h.shape[-1]), chosen.ids.reshape(-1)
    factors = chosen.gates.reshape(-1, 1) if config.experts.on_input else None
    x, ws, biases = _kernel_inputs(rows, pairs, factors, parts, own_biases)
    products, pool, fetched = quants.arriving_products(
        x, pairs, slots, ws, biases, arriving, **_kernel_options(config)
    )
    products = jnp.where(slots[pairs][:, None] >= 0, products, 0.0)
    return products.reshape(*lead, used, -1), pool, fetched


def chosen_products(
    chosen: Chosen,
    parts: Mapping[str, quants.Stacked],
    own_biases: Mapping[str, Array],
    slots: Array | None,
    before: Array | None,
    config: Config,
) -> Array:
    """`expert_products` of what a layer chose."""
    scales = chosen.gates if config.experts.on_input else None
    return expert_products(chosen.h, chosen.ids, parts, own_biases, slots, before, config, scales)


def chosen_sum(products: Array, chosen: Chosen, config: Config) -> Array:
    """`combined` of what a layer chose."""
    gates = jnp.ones_like(chosen.gates) if config.experts.on_input else chosen.gates
    return combined(products, gates, chosen.beside)


def combined(products: Array, gates: Array, beside: Array | None) -> Array:
    """The weighted sum of the experts' products `[B, T, k, D]`, and what the shared experts gave."""
    # Written out: with a reduction here, whose sum a product is added to, XLA's CPU backend (JAX 0.10.2) gave wrong
    # numbers.
    total = jnp.zeros((), jnp.float32)
    for rank in range(products.shape[-2]):
        total = total + products[..., rank, :] * gates[..., rank, None]
    return total if beside is None else total + beside


def block_rows(rows: int) -> int:
    """Rows of a block of one expert: from 64 on XLA's CPU backend sums in the same order however a prompt is cut."""
    return 64 if rows >= 64 else 16


def _by_kernels(
    rows: Array,
    pairs: Array,
    factors: Array | None,
    parts: Mapping[str, quants.Stacked],
    own_biases: Mapping[str, Array],
    slots: Array | None,
    out: Array,
    config: Config,
) -> Array:
    """Each expert's blocks read once for the tokens that chose it, in three launches."""
    x, ws, biases = _kernel_inputs(rows, pairs, factors, parts, own_biases)
    products = quants.mixture_products(x, pairs, slots, ws, biases, **_kernel_options(config))
    return products if slots is None else jnp.where(slots[pairs][:, None] >= 0, products, out)


def _kernel_inputs(
    rows: Array,
    pairs: Array,
    factors: Array | None,
    parts: Mapping[str, quants.Stacked],
    own_biases: Mapping[str, Array],
) -> tuple[Array, tuple[quants.Stacked, quants.Stacked, quants.Stacked], tuple[Array, ...] | None]:
    """Activations, matrices and biases as the kernels take them."""
    if factors is not None:
        rows = jnp.repeat(rows, len(pairs) // len(rows), axis=0) * factors
    gate, up, down = (parts[name] for name in EXPERT_MATRICES)
    biases = tuple(own_biases[name] for name in EXPERT_MATRICES) if own_biases else None
    return rows.astype(jnp.float32), (gate, up, down), biases


def _kernel_options(config: Config) -> dict[str, Any]:
    experts = config.experts
    return {
        "experts": experts.count,
        "activation": experts.activation,
        "dtype": np.dtype(config.compute_dtype),
        "capability": experts.capability,
    }


def _by_pair(
    rows: Array,
    pairs: Array,
    factors: Array | None,
    parts: Mapping[str, quants.Stacked],
    own_biases: Mapping[str, Array],
    slots: Array | None,
    out: Array,
    config: Config,
) -> Array:
    """Each token with each of its experts alone."""
    dtype, experts = np.dtype(config.compute_dtype), config.experts
    where = pairs if slots is None else slots[pairs]
    inputs = jnp.repeat(rows, len(pairs) // len(rows), axis=0)
    inputs = inputs if factors is None else inputs * factors

    def some(x: Array, index: Array, expert: Array) -> Array:
        def product(x: Array, name: str) -> Array:
            y = quants.matmul_each(x, parts[name], index, dtype=dtype)
            return y + own_biases[name][expert] if own_biases else y

        gate, up = (product(x, name) for name in EXPERT_MATRICES[:2])
        return product(layers.gated(gate, up, experts.activation), EXPERT_MATRICES[2])

    at_once = max(GATHERED_BYTES // sum(part.nbytes for part in parts.values()), 1)
    pieces = next(n for n in range(1, len(pairs) + 1) if len(pairs) % n == 0 and len(pairs) // n <= at_once)
    if pieces == 1:
        products = some(inputs, where, pairs)
    else:
        split = (
            inputs.reshape(pieces, -1, inputs.shape[1]),
            *(a.reshape(pieces, -1) for a in (where, pairs)),
        )
        products = jax.lax.map(lambda piece: some(*piece), split).reshape(out.shape)
    return products if slots is None else jnp.where(where[:, None] >= 0, products, out)


def _by_expert(
    rows: Array,
    pairs: Array,
    factors: Array | None,
    parts: Mapping[str, quants.Stacked],
    own_biases: Mapping[str, Array],
    slots: Array | None,
    out: Array,
    config: Config,
) -> Array:
    """Tokens grouped by expert; a few experts are decoded at once, so that the workspace does not grow with them."""
    dtype, experts = np.dtype(config.compute_dtype), config.experts
    used = len(pairs) // len(rows)
    if slots is not None:
        pairs = jnp.where(slots[pairs] >= 0, pairs, experts.count)
    groups = layers.group_by_expert(pairs, experts.count, block_rows(len(rows)))
    blocks = len(groups.expert)
    at_once = min(decoded_experts(config), blocks)
    missing = -blocks % at_once
    held = jnp.pad(groups.pairs, ((0, missing), (0, 0)), constant_values=len(pairs))
    expert = jnp.pad(groups.expert, (0, missing))
    where = expert if slots is None else jnp.maximum(slots[expert], 0)

    def some(step: Array, out: Array) -> Array:
        begin = step * at_once
        own = jax.lax.dynamic_slice_in_dim(held, begin, at_once)  # [G, M]
        index = jax.lax.dynamic_slice_in_dim(where, begin, at_once)
        x = rows.at[own // used].get(mode="clip")  # [G, M, D]
        x = x if factors is None else x * factors.at[own].get(mode="clip")
        of_block = jax.lax.dynamic_slice_in_dim(expert, begin, at_once)

        def product(x: Array, name: str) -> Array:
            y = quants.matmul_blocks(x, parts[name], index, dtype=dtype)
            return y + own_biases[name][of_block][:, None] if own_biases else y

        gate, up = (product(x, name) for name in EXPERT_MATRICES[:2])
        made = product(layers.gated(gate, up, experts.activation), EXPERT_MATRICES[2])
        return out.at[own.reshape(-1)].set(made.reshape(-1, made.shape[-1]), mode="drop")

    return jax.lax.fori_loop(0, -(-groups.used // at_once), some, out)


def decoded_experts(config: Config) -> int:
    """How many experts are decoded at once."""
    return max(TILE_WEIGHTS // (config.experts.d_ff * config.d_model), 1)
