"""Mixtures of experts: which experts a token goes to, with which weight, and how tokens are grouped by expert.

Shazeer et al., Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer, 2017.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from airjax.types import Array

Scoring = Literal["softmax", "sigmoid", "softmax of chosen"]


@dataclass(frozen=True)
class Routing:
    """How a router's logits become a choice; hashable, a static argument of jit.

    Attributes:
      used: experts of each token, k.
      scoring: from logits to scores: over all experts, of each for itself, or over the chosen ones alone (gpt-oss).
      normalized: the weights of the chosen ones are divided by their sum.
      scale: factor of the weights.
      groups: neighbouring experts that are kept or dropped together; 1 for none.
      groups_used: how many groups a token may choose from.
      group_best: a group counts as much as the sum of its so many best scores (1: DeepSeek-V2, 2: DeepSeek-V3).
    """

    used: int
    scoring: Scoring = "softmax"
    normalized: bool = False
    scale: float = 1.0
    groups: int = 1
    groups_used: int = 1
    group_best: int = 1


def choose(logits: Array, routing: Routing, bias: Array | None = None) -> tuple[Array, Array]:
    """The experts of each token, the best first, and their weights.

    DeepSeek-AI, DeepSeek-V3 Technical Report, 2024, for the bias, which moves the choice but not the weights, and
    for groups.

    Args:
      logits: of the router, float32 `[..., E]`.
      routing: how to choose (static).
      bias: float32 `[E]`, added to the scores where experts are compared.

    Returns:
      ids int32 `[..., k]` and weights float32 `[..., k]`.
    """
    of_chosen = routing.scoring == "softmax of chosen" or (
        routing.scoring == "softmax" and routing.normalized
    )
    if of_chosen and bias is None and routing.groups == 1:
        ids, weights = _chosen_softmax(logits, routing.used)
    else:
        ids, weights = _chosen_scores(logits, routing, bias)
    return ids, weights if routing.scale == 1 else weights * routing.scale


def _chosen_scores(logits: Array, routing: Routing, bias: Array | None) -> tuple[Array, Array]:
    if routing.scoring == "sigmoid":
        scores = jax.nn.sigmoid(logits)
    elif routing.scoring == "softmax":
        scores = jax.nn.softmax(logits, axis=-1)
    else:
        scores = logits
    compared = scores if bias is None else scores + bias
    if routing.groups > 1:
        grouped = compared.reshape(*compared.shape[:-1], routing.groups, -1)
        worth = jnp.sum(jax.lax.top_k(grouped, routing.group_best)[0], axis=-1)  # [..., groups]
        _, kept = jax.lax.top_k(worth, routing.groups_used)
        keep = jnp.any(jax.nn.one_hot(kept, routing.groups, dtype=bool), axis=-2)
        compared = jnp.where(keep[..., None], grouped, -jnp.inf).reshape(compared.shape)
    _, ids = jax.lax.top_k(compared, routing.used)
    weights = jnp.take_along_axis(scores, ids, axis=-1)
    if routing.scoring == "softmax of chosen":
        weights = jax.nn.softmax(weights, axis=-1)
    if routing.normalized:
        weights = weights / jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 1e-20)
    return ids, weights


def _chosen_softmax(logits: Array, used: int) -> tuple[Array, Array]:
    """The experts with the largest logits and the softmax over these, which is that over all, normalized.

    Written out, so that a GPU takes two kernels less a layer than with reductions.
    """
    best, ids = jax.lax.top_k(logits, used)
    weights = jnp.exp(best - best[..., :1])
    total = weights[..., :1]
    for rank in range(1, used):
        total = total + weights[..., rank : rank + 1]
    return ids, weights / total


class Grouping(NamedTuple):
    """Pairs of a token and one of its experts in blocks, each of one expert, the experts in rising order.

    Attributes:
      pairs: `[blocks, rows]` int32: which pair each row holds; the number of pairs for a row that holds none.
      expert: `[blocks]` int32: the expert of each block.
      used: int32: how many blocks hold any pair; they are the first ones.
    """

    pairs: Array
    expert: Array
    used: Array


def group_by_expert(expert: Array, count: int, rows: int) -> Grouping:
    """Puts the pairs of each expert together, in blocks of one size, so that products with them have one shape.

    Gale et al., MegaBlocks: Efficient Sparse Training with Mixture-of-Experts, 2022, has the idea.

    Args:
      expert: of each pair, int32 `[P]`; `count` for a pair that is left out.
      count: E, how many experts there are (static).
      rows: of a block (static).
    """
    (pairs,) = expert.shape
    blocks = most_blocks(pairs, count, rows)
    held = jnp.zeros(count + 1, jnp.int32).at[expert].add(1)[:count]  # [E]
    order = jnp.argsort(expert, stable=True)
    of_pair = expert[order]
    needed = -(-held // rows)
    last_block, last_pair = jnp.cumsum(needed), jnp.cumsum(held)
    # Past the end for pairs that are left out, so that the scatter drops them.
    kept = of_pair < count
    of_pair = jnp.minimum(of_pair, count - 1)
    rank = jnp.arange(pairs, dtype=jnp.int32) - (last_pair - held)[of_pair]
    block = jnp.where(kept, (last_block - needed)[of_pair] + rank // rows, blocks)
    placed = jnp.full((blocks, rows), pairs, jnp.int32)
    placed = placed.at[block, rank % rows].set(order.astype(jnp.int32), mode="drop")
    of_block = jnp.searchsorted(last_block, jnp.arange(blocks, dtype=jnp.int32), side="right")
    return Grouping(placed, jnp.minimum(of_block, count - 1).astype(jnp.int32), last_block[-1])


def most_blocks(pairs: int, count: int, rows: int) -> int:
    """How many blocks `pairs` pairs with `count` experts can need at most."""
    hit = min(pairs, count)
    return hit + (pairs - hit) // rows
