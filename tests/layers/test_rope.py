"""Rope against rotation of complex numbers in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from airjax.layers import rope, rope_frequencies


def _expected(x, positions, frequencies, interleaved):
    pairs = len(frequencies)
    turned = np.exp(1j * positions[..., None].astype(np.float64) * frequencies.astype(np.float64))[:, :, None]
    out = x.astype(np.float64).copy()
    first, second = (slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2))
    if not interleaved:
        first, second = slice(0, pairs), slice(pairs, 2 * pairs)
    z = (x[..., first] + 1j * x[..., second]) * turned
    out[..., first], out[..., second] = z.real, z.imag
    return out


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("width", [8, 6])
def test_rope_rotates_pairs_and_leaves_the_rest(interleaved, width):
    generator = np.random.default_rng(0)
    x = generator.normal(size=(2, 5, 3, 8)).astype(np.float32)
    positions = generator.integers(0, 500, (2, 5)).astype(np.int32)
    frequencies = rope_frequencies(width, 10_000.0)
    got = rope(jnp.asarray(x), jnp.asarray(positions), frequencies, interleaved)
    np.testing.assert_allclose(got, _expected(x, positions, frequencies, interleaved), atol=2e-4)


def test_scores_depend_on_the_distance_only():
    generator = np.random.default_rng(1)
    q, k = (jnp.asarray(generator.normal(size=(1, 1, 1, 64)), jnp.float32) for _ in range(2))
    frequencies = rope_frequencies(64, 10_000.0)

    def score(at_q, at_k):
        turned = [rope(x, jnp.array([[at]]), frequencies, True) for x, at in ((q, at_q), (k, at_k))]
        return float(jnp.sum(turned[0] * turned[1]))

    assert score(7, 3) == pytest.approx(score(107, 103), abs=1e-4)


def test_frequencies_follow_the_paper():
    np.testing.assert_allclose(rope_frequencies(4, 100.0), [1.0, 0.1], rtol=1e-7)
    np.testing.assert_allclose(rope_frequencies(4, 100.0, linear_factor=2.0), [0.5, 0.05], rtol=1e-7)
    np.testing.assert_allclose(rope_frequencies(4, 100.0, factors=(1.0, 8.0)), [1.0, 0.0125], rtol=1e-7)
