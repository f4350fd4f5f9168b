"""Our transforms and llama.cpp's samplers leave the same candidates, in the same order, of the same probability."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from airjax.sampling import standard
from airjax.sampling.adaptive import aim_at, aim_of
from airjax.sampling.mirostat import keep

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "samplers.json").read_text(encoding="utf-8"))
LOGITS = jnp.asarray(GOLDEN["logits"], jnp.float32)
ROWS, V = LOGITS.shape
HISTORY = np.tile(np.asarray(GOLDEN["history"], np.int32), (ROWS, 1))


def cases(*names):
    found = [case for case in GOLDEN["cases"] if case["sampler"] in names]
    assert {case["sampler"] for case in found} == set(names)
    return pytest.mark.parametrize(
        ("settings", "steps"),
        [(case["settings"], case["steps"]) for case in found],
        ids=[f"{case['sampler']}-{'-'.join(map(str, case['settings'].values()))}" for case in found],
    )


@functools.partial(jax.jit, static_argnames="apply")
def step(apply, logits, state, token):
    return apply(logits, state, token)[0]


def check(logits, expected):
    """Compares a row of our logits with llama.cpp's candidates."""
    logits = np.asarray(logits, np.float64)
    order = [token for token in np.argsort(-logits, kind="stable").tolist() if logits[token] > -np.inf]
    probs = np.exp(logits[order] - logits[order[0]])
    np.testing.assert_allclose(probs / probs.sum(), expected["probs"], rtol=2e-4, atol=1e-6)
    assert sorted(order) == sorted(expected["ids"])
    # Where llama.cpp's float32 makes two logits equal, the order of the two is free.
    theirs = dict(zip(expected["ids"], expected["probs"], strict=True))
    in_our_order = [theirs[token] for token in order]
    np.testing.assert_allclose(in_our_order, expected["probs"], rtol=1e-4, atol=1e-7)


@cases(
    *("temp", "temp_ext", "top_k", "top_p", "typical", "min_p", "top_n_sigma", "xtc", "penalties", "dry"),
    "logit_bias",
)
def test_the_same_candidates_are_left(settings, steps):
    settings = dict(settings)
    if "logit_bias" in settings:
        settings["logit_bias"] = {int(token): float(bias) for token, bias in settings["logit_bias"].items()}
    transform = standard(**settings, key=jax.random.key(0))
    state = transform.init(HISTORY[:, :-1], V)
    out = step(transform.apply, LOGITS, state, jnp.asarray(HISTORY[:, -1]))
    for row, expected in zip(out, steps, strict=True):
        check(row, expected)


@cases("mirostat", "mirostat_v2")
def test_mirostat_keeps_the_same_as_its_bound_moves(settings, steps):
    tau, eta = settings["mirostat_tau"], settings["mirostat_eta"]
    mu = 2 * tau
    for row, expected in zip(LOGITS, steps, strict=True):
        bound, size = jnp.array([mu], jnp.float32), jnp.array([V], jnp.float32)
        kept = keep(row[None], jnp.array([settings["mirostat"]]), bound, size)[0]
        check(kept, expected)
        surprise = -jax.nn.log_softmax(kept)[expected["selected"]] / np.log(2)
        mu -= eta * (float(surprise) - tau)


@cases("adaptive_p")
def test_adaptive_p_has_the_same_distribution_as_its_aim_moves(settings, steps):
    target, decay = settings["adaptive_p_target"], settings["adaptive_p_decay"]
    weight = 1 / (1 - decay)
    total = target * weight
    for row, expected in zip(LOGITS, steps, strict=True):
        aim = aim_of(jnp.float32([target]), jnp.float32([total]), jnp.float32([weight]))
        check(aim_at(row[None], aim)[0], expected)
        total = float(jax.nn.softmax(row)[expected["selected"]]) + decay * total
        weight = 1 + decay * weight
