"""Norms and activations against their formulas."""

import jax.numpy as jnp
import numpy as np
import pytest

from airjax.layers import gated, rms_norm, xielu


def test_rms_norm_follows_its_formula():
    generator = np.random.default_rng(0)
    x, weight = generator.normal(size=(3, 5, 32)) * 10, generator.normal(size=32)
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weight
    got = rms_norm(jnp.asarray(x, jnp.float32), jnp.asarray(weight, jnp.float32), 1e-5)
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_gated_follows_its_formula(activation):
    gate, up = np.random.default_rng(1).normal(size=(2, 4, 16)) * 3
    silu = gate / (1 + np.exp(-gate))
    gelu = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
    got = gated(jnp.asarray(gate, jnp.float32), jnp.asarray(up, jnp.float32), activation)
    np.testing.assert_allclose(got, (silu if activation == "silu" else gelu) * up, rtol=1e-5, atol=1e-6)


def test_xielu_follows_its_formula_and_is_smooth_at_zero():
    alpha_n, alpha_p, beta, eps = 0.3, -0.7, 0.4, -1e-6
    above, below = np.log1p(np.exp(alpha_p)), beta + np.log1p(np.exp(alpha_n))
    x = np.array([-30.0, -2.0, -0.5, 0.5, 3.0])
    expected = np.where(x > 0, above * x**2 + beta * x, below * (np.expm1(x) - x) + beta * x)
    got = xielu(jnp.asarray(x, jnp.float32), *(jnp.float32(c) for c in (alpha_n, alpha_p, beta, eps)))
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    near = jnp.asarray([-1e-3, 1e-3], jnp.float32)
    slopes = xielu(near, *(jnp.float32(c) for c in (alpha_n, alpha_p, beta, eps))) / near
    np.testing.assert_allclose(slopes, beta, atol=2e-3)
