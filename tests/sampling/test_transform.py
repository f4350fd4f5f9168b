"""The contract of a transform: chains, one compilation for all settings, vmap, checked parameters."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from airjax.sampling import (
    chain,
    draw,
    dry,
    greedy,
    min_p,
    output_penalties,
    penalties,
    repetition_penalty,
    temperature,
    top_k,
    top_p,
    typical_p,
    within_top_k,
)

V = 300
CONTEXT = np.array([[3, 4, 5, -1], [7, 7, 8, 9]], np.int32)
TOKEN = jnp.array([6, -1], jnp.int32)
ALL = {
    "greedy": greedy(),
    "temperature": temperature(0.7),
    "top_k": top_k(40),
    "top_p": top_p(0.8),
    "min_p": min_p(0.02),
    "repetition_penalty": repetition_penalty(1.3),
}
every_transform = pytest.mark.parametrize("transform", ALL.values(), ids=ALL.keys())


def random_logits(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32) * 3)


def run(transform, logits, context=CONTEXT, token=TOKEN):
    return fast_apply(transform.apply, logits, transform.init(context, logits.shape[-1]), token)


@functools.partial(jax.jit, static_argnames="apply")
def fast_apply(apply, logits, state, token):
    return apply(logits, state, token)[0]


@functools.partial(jax.jit, static_argnames="apply")
def step(apply, logits, state, token, key):
    logits, state = apply(logits, state, token)
    return draw(logits, key), state


def test_chain_equals_each_by_hand():
    logits = random_logits(2, V)
    chained = run(chain(*ALL.values()), logits)
    for transform in ALL.values():
        logits = run(transform, logits)
    np.testing.assert_array_equal(chained, logits)


def test_chain_applies_from_left_to_right():
    logits = random_logits(2, V)
    cut_first = run(chain(top_p(0.5), temperature(3.0)), logits)
    flatten_first = run(chain(temperature(3.0), top_p(0.5)), logits)
    assert np.isfinite(flatten_first).sum() > np.isfinite(cut_first).sum()


def test_chains_nest():
    logits = random_logits(2, V)
    flat = chain(top_k(9), top_p(0.8), temperature(0.5))
    nested = chain(chain(top_k(9), top_p(0.8)), temperature(0.5))
    np.testing.assert_array_equal(run(flat, logits), run(nested, logits))


def test_a_chain_in_which_nothing_is_on_carries_its_state_as_its_parts_do():
    parts = [penalties(1), output_penalties(0), dry(0), top_p(1)]
    state, alone = chain(*parts).init(CONTEXT, V), [part.init(CONTEXT, V) for part in parts]
    logits = random_logits(2, V)
    for token in ([20, 21], [22, -1], [20, 21]):
        token = jnp.array(token, jnp.int32)
        out, state = chain(*parts).apply(logits, state, token)
        np.testing.assert_array_equal(out, logits)
        alone = [part.apply(logits, own, token)[1] for part, own in zip(parts, alone, strict=True)]
    jax.tree.map(np.testing.assert_array_equal, state, tuple(alone))
    # One row that is on leaves the other as it was, and its own history is there.
    on = chain(penalties(2, last_n=[0, 9]), dry(0)).init(CONTEXT, V)
    on = ((*on[0][:-1], state[0][-1]), on[1])
    out, _ = chain(*parts[:1], dry(0)).apply(logits, on, jnp.array([-1, -1]))
    changed = [set(np.nonzero(row)[0].tolist()) for row in np.asarray(out != logits)]
    assert changed == [set(), {7, 8, 9, 21}]


@pytest.mark.parametrize("k", [0, 1, 5, 128, 129, 250, 400])
@pytest.mark.parametrize("ties", [False, True])
def test_within_top_k_equals_the_chain(k, ties):
    logits = random_logits(2, V)
    logits = jnp.round(logits).at[:, ::7].set(-jnp.inf) if ties else logits
    inner = chain(typical_p(0.9), top_p(0.8), min_p(0.01), temperature([0.7, 0]))
    by_hand = run(chain(top_k([k, 3]), inner), logits)
    np.testing.assert_allclose(run(within_top_k([k, 3], inner), logits), by_hand, rtol=1e-6)
    few = jnp.full((2, V), -jnp.inf).at[:, jnp.array([4, V - 1])].set(1.0)
    np.testing.assert_array_equal(run(within_top_k([k, 3], chain()), few), run(top_k([k, 3]), few))


def test_chain_of_nothing_changes_nothing():
    logits = random_logits(2, V)
    np.testing.assert_array_equal(run(chain(), logits), logits)


def test_chain_carries_the_state_from_token_to_token():
    logits = random_logits(2, V)
    sampler = chain(temperature(1.0), repetition_penalty(2.0))
    _, state = sampler.apply(logits, sampler.init(CONTEXT, V), jnp.array([20, 21]))
    out, _ = sampler.apply(logits, state, jnp.array([22, 23]))
    changed = [set(np.nonzero(row)[0].tolist()) for row in np.asarray(out != logits)]
    assert changed == [{3, 4, 5, 20, 22}, {7, 8, 9, 21, 23}]


def test_one_compilation_serves_every_setting():
    def sampler(t, k, p, m, r):
        return chain(repetition_penalty(r), top_k(k), top_p(p), min_p(m), temperature(t))

    traces = []

    # Counted by its traces: the jit's own cache also tells a numpy state from a jax one, which compiles nothing.
    @functools.partial(jax.jit, static_argnames="apply")
    def counted(apply, logits, state, token, key):
        traces.append(apply)
        return step(apply, logits, state, token, key)

    logits, key = random_logits(2, V), jax.random.key(0)
    for settings in [
        (1.0, 0, 1.0, 0, 1),
        (0.7, 40, 0.9, 0.1, 1.1),
        (0, 1, 0.0, 1.0, 0.5),
        ([1, 0], [5, 6], 1, 0, 1),
    ]:
        transform = sampler(*settings)
        state = transform.init(CONTEXT, V)
        for _ in range(3):
            _, state = counted(transform.apply, logits, state, TOKEN, key)
    assert len(traces) == 1


def test_apply_is_equal_for_equal_structure_and_differs_for_another():
    one, other = chain(top_k(5), temperature(0.1)), chain(top_k(9), temperature(2.0))
    assert one.apply == other.apply
    assert hash(one.apply) == hash(other.apply)
    assert one.apply != chain(temperature(0.1), top_k(5)).apply


@every_transform
def test_every_leaf_of_the_state_has_one_row_per_sequence(transform):
    assert {leaf.shape[0] for leaf in jax.tree.leaves(transform.init(CONTEXT, V))} <= {2}


@every_transform
def test_batch_rows_do_not_mix(transform):
    logits = random_logits(2, V)
    both = run(transform, logits)
    for row in range(2):
        alone = run(transform, logits[row : row + 1], CONTEXT[row : row + 1], TOKEN[row : row + 1])
        np.testing.assert_array_equal(alone[0], both[row])


@every_transform
def test_vmap_equals_a_loop(transform):
    logits = random_logits(3, 2, V)
    state = transform.init(CONTEXT, V)
    mapped = jax.jit(jax.vmap(lambda x: transform.apply(x, state, TOKEN)[0]))(logits)
    for one, x in zip(mapped, logits, strict=True):
        np.testing.assert_array_equal(one, fast_apply(transform.apply, x, state, TOKEN))


@every_transform
def test_init_can_be_traced(transform):
    traced = jax.jit(transform.init, static_argnums=1)(jnp.asarray(CONTEXT), V)
    jax.tree.map(np.testing.assert_array_equal, traced, transform.init(CONTEXT, V))


def test_parameters_may_differ_within_a_batch():
    logits = random_logits(2, V)
    mixed = run(chain(top_k([3, 0]), temperature([0.5, 2.0])), logits)
    first = run(chain(top_k(3), temperature(0.5)), logits)
    second = run(chain(top_k(0), temperature(2.0)), logits)
    np.testing.assert_array_equal(mixed, jnp.stack([first[0], second[1]]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: temperature(-0.5), "temperature must be in [0, inf), got -0.5"),
        (lambda: temperature(float("nan")), "temperature must be in [0, inf), got nan"),
        (lambda: temperature(float("inf")), "temperature must be in [0, inf), got inf"),
        (lambda: temperature([0.5, -2.0]), "temperature must be in [0, inf), got -2"),
        (lambda: temperature(np.ones((2, 2))), "temperature must be one number or one per sequence"),
        (lambda: top_k(-1), "top_k must be in [0, inf), got -1"),
        (lambda: top_k(2.5), "top_k must be a whole number, got 2.5"),
        (lambda: top_p(1.01), "top_p must be in [0, 1], got 1.01"),
        (lambda: top_p(-0.1), "top_p must be in [0, 1], got -0.1"),
        (lambda: min_p(2), "min_p must be in [0, 1], got 2"),
        (lambda: repetition_penalty(0), "repetition_penalty must be in (0, inf), got 0"),
        (
            lambda: top_k([1, 2, 3]).init(CONTEXT, V),
            "a sampling parameter has 3 values for a batch of 2 sequences",
        ),
    ],
)
def test_a_parameter_out_of_range_names_the_range_and_the_value(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_a_top_k_beyond_every_vocabulary_keeps_all():
    logits = random_logits(2, V)
    np.testing.assert_array_equal(run(top_k(10**12), logits), logits)
