"""Norms and activations against their formulas."""

import jax.numpy as jnp
import numpy as np
import pytest

from airjax.layers import gated, rms_norm


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
