"""Draws: their distribution, and that a row's draw depends on nothing but that row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from airjax.sampling import chain, draw, greedy, log_prob, repetition_penalty, temperature, top_p

NEG_INF = -np.inf
fast_draw = jax.jit(draw)


def random_logits(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32) * 2)


def frequencies(logits, count, seed=0):
    """How often each token comes up in `count` draws with different keys."""
    keys = jax.random.split(jax.random.key(seed), count)
    tokens = fast_draw(jnp.broadcast_to(logits, (count, *logits.shape)), keys)
    return np.bincount(np.asarray(tokens), minlength=len(logits))


def chi_square(observed, probabilities):
    expected = probabilities * observed.sum()
    return ((observed - expected) ** 2 / expected).sum()


@pytest.mark.parametrize("vocab", [7, 256, 700])
def test_frequencies_follow_the_distribution(vocab):
    logits = random_logits(vocab) / 2  # one block; one block exactly; blocks with a part of one
    observed = frequencies(logits, 60_000)
    statistic = chi_square(observed, np.asarray(jax.nn.softmax(logits), np.float64))
    # A chi-square has mean n - 1 and variance 2 (n - 1): five deviations is one false alarm in a million.
    degrees = vocab - 1
    assert statistic < degrees + 5 * np.sqrt(2 * degrees) + 10


def test_frequencies_of_truncated_logits_follow_what_is_left():
    logits = jnp.log(jnp.array([0.1, 0.2, 0.3, 0.4]))
    cut = top_p(0.6)
    logits, _ = cut.apply(logits[None], cut.init(np.zeros((1, 0), np.int32), 4), jnp.array([-1]))
    observed = frequencies(logits[0], 20_000)
    assert observed[0] == observed[1] == 0
    assert chi_square(observed[2:], np.array([3 / 7, 4 / 7])) < 20


def test_a_token_ruled_out_never_comes_up():
    logits = jnp.full((1000,), NEG_INF).at[jnp.array([3, 300, 999])].set(jnp.array([-80.0, 0.0, -1.0]))
    observed = frequencies(logits, 5000)
    assert set(np.nonzero(observed)[0].tolist()) <= {3, 300, 999}
    assert observed[999] > 0


def test_one_token_left_is_always_drawn():
    logits = random_logits(64, 1000)
    transform = greedy()
    cut, _ = transform.apply(logits, (), jnp.full((64,), -1))
    np.testing.assert_array_equal(fast_draw(cut, jax.random.key(3)), jnp.argmax(logits, axis=-1))


def test_the_same_key_draws_the_same_and_another_key_differs():
    logits = jnp.zeros((1, 5000))
    first = int(fast_draw(logits, jax.random.key(1))[0])
    assert first == int(fast_draw(logits, jax.random.key(1))[0])
    assert len({int(fast_draw(logits, jax.random.key(seed))[0]) for seed in range(20)}) > 15


def test_rows_of_equal_logits_draw_independently():
    tokens = np.asarray(fast_draw(jnp.zeros((200, 50)), jax.random.key(0)))
    assert len(set(tokens.tolist())) > 35


@pytest.mark.parametrize("others", [1, 6])
def test_a_draw_does_not_depend_on_the_rest_of_the_batch(others):
    logits = random_logits(1, 3000)
    rest = random_logits(others, 3000, seed=9)
    keys = jax.random.split(jax.random.key(5), 40)
    for key in keys[:8]:
        alone = fast_draw(logits, key[None])[0]
        company = fast_draw(jnp.concatenate([logits, rest]), jnp.concatenate([key[None], keys[-others:]]))
        assert company[0] == alone
        assert fast_draw(jnp.concatenate([logits, rest]), key)[0] == fast_draw(logits, key)[0]


def test_a_seed_gives_the_same_tokens_whatever_else_is_in_the_batch():
    def generate(contexts, seeds, steps=12):
        """Tokens `[steps, B]` of a toy model whose logits follow from the last token."""
        table = random_logits(97, 97, seed=4)
        sampler = chain(repetition_penalty(1.5), top_p(0.9), temperature(1.2))
        state = sampler.init(contexts[:, :-1], 97)
        keys = jax.vmap(jax.random.key)(jnp.asarray(seeds))

        @jax.jit
        def step(state, token, index):
            logits, state = sampler.apply(table[token], state, token)
            return state, draw(logits, jax.vmap(jax.random.fold_in, (0, None))(keys, index))

        token = jnp.asarray(contexts[:, -1])
        tokens = []
        for index in range(steps):
            state, token = step(state, token, index)
            tokens.append(np.asarray(token))
        return np.stack(tokens)

    contexts = np.random.default_rng(2).integers(0, 97, (5, 6)).astype(np.int32)
    together = generate(contexts, [10, 11, 12, 13, 14])
    for row in (0, 3):
        alone = generate(contexts[row : row + 1], [10 + row])
        np.testing.assert_array_equal(alone[:, 0], together[:, row])


def test_draw_works_under_vmap():
    logits = random_logits(3, 2, 500)
    keys = jax.random.split(jax.random.key(0), (3, 2))
    expected = jnp.stack([fast_draw(x, key) for x, key in zip(logits, keys, strict=True)])
    np.testing.assert_array_equal(jax.jit(jax.vmap(draw))(logits, keys), expected)


@pytest.mark.parametrize("key", [jnp.zeros(2, jnp.uint32), jax.random.split(jax.random.key(0), 3)])
def test_a_key_of_the_wrong_kind_or_number_is_refused(key):
    with pytest.raises(ValueError, match=r"key must be one jax\.random\.key or 2 of them, one per sequence"):
        draw(jnp.zeros((2, 4)), key)


def test_log_prob_is_the_logarithm_of_softmax():
    probabilities = np.array([[0.1, 0.2, 0.7], [0.5, 0.25, 0.25]])
    logits = jnp.asarray(np.log(probabilities) + 3, jnp.float32)
    np.testing.assert_allclose(log_prob(logits, jnp.array([2, 0])), np.log([0.7, 0.5]), rtol=1e-5)


def test_log_prob_of_a_token_ruled_out_is_minus_infinity():
    assert log_prob(jnp.array([[0.0, NEG_INF]]), jnp.array([1]))[0] == NEG_INF
