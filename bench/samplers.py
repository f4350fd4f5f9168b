"""What samplers cost beside a decode step, and what grammar masks cost beside a sweep.

    python bench/samplers.py --model=SMOLLM2.gguf

Prints a table: each sampler's time alone in a jitted step with its draw, less that of the draw from bare logits, and
its share of the model's decode step; then the time of a mask on the host, and of a decode step with and without a
grammar.
"""

from __future__ import annotations

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

import airjax
from airjax import sampling

_MODEL = flags.DEFINE_string("model", None, "The GGUF file.", required=True)
_REPEATS = flags.DEFINE_integer("repeats", 200, "Measured steps of each sampler.")
_TOKENS = flags.DEFINE_integer("tokens", 64, "Decoded tokens of a generation.")

FULL: dict[str, Any] = {
    "logit_bias": {3: 2.0, 5: -100.0},
    "repeat_penalty": 1.1,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.1,
    "openai_frequency_penalty": 0.5,
    "dry_multiplier": 0.8,
    "top_n_sigma": 3.0,
    "top_k": 100,
    "typical_p": 0.95,
    "top_p": 0.95,
    "min_p": 0.05,
    "xtc_probability": 0.5,
    "temperature": 0.8,
    "dynatemp_range": 0.3,
}
ALONE = [
    *({name: FULL[name]} for name in FULL),
    {"mirostat": 1},
    {"mirostat": 2},
]


@functools.partial(jax.jit, static_argnames="apply")
def step(apply: Any, logits: jax.Array, state: Any, token: jax.Array, key: jax.Array) -> Any:
    """One draw, as the engine's own step does it."""
    out, state = apply(logits, state, token)
    drawn = sampling.draw(out, key[None])
    return drawn, sampling.log_prob(logits, drawn), state


def time_ms(transform: sampling.Transform, rows: np.ndarray, context: np.ndarray) -> float:
    """Median milliseconds of a step over different logits, its state carried along."""
    vocab = rows.shape[1]
    state = transform.init(context, vocab)
    token = jnp.asarray(context[:, -1])
    placed = [jax.device_put(row[None]) for row in rows]
    times = []
    for at in range(_REPEATS.value + 3):
        logits, key = placed[at % len(placed)], jax.random.key(at)
        jax.block_until_ready((logits, key))
        begin = time.perf_counter()
        token, _, state = jax.block_until_ready(step(transform.apply, logits, state, token, key))
        times.append(time.perf_counter() - begin)
    return float(np.median(times[3:])) * 1e3


def decode_ms(engine: airjax.Engine, ids: list[int], **options: Any) -> float:
    """Milliseconds of a decoded token."""
    for _ in range(2):
        tokens = list(engine.generate(ids, max_tokens=_TOKENS.value, ignore_eos=True, **options))
    return 1e3 * engine.stats.decode_s / max(len(tokens) - 1, 1)


def main(argv: list[str]) -> None:
    """Measures and prints."""
    del argv
    key = jax.random.key(1)
    with airjax.load(_MODEL.value, context=1024) as engine:
        text = (
            "The link between the host and the device carries a layer's weights while the last one computes. "
        )
        ids = engine.tokenizer.encode(text * 8)
        rows = engine.logits(ids)[-16:]
        context = np.asarray([ids], np.int32)
        decode = decode_ms(engine, ids, sampler=sampling.chain())
        bare = time_ms(sampling.chain(), rows, context)
        print(f"{jax.devices()[0].device_kind}, V = {rows.shape[1]}, a decode step {decode:.2f} ms")
        print(f"{'a draw from bare logits':32s} {bare:7.3f} ms {100 * bare / decode:6.2f} %")
        named = [("standard(), all off", {}), *((str(s)[1:-1], s) for s in ALONE), ("full chain", FULL)]
        for name, settings in named:
            ms = time_ms(sampling.standard(**settings, key=key), rows, context) - bare
            print(f"{name[:32]:32s} {ms:7.3f} ms {100 * ms / decode:6.2f} %")
        _grammars(engine, ids, decode)


def _grammars(engine: airjax.Engine, ids: list[int], decode: float) -> None:
    json_text = engine.grammar(gbnf='root ::= "[" ( [^"\\x00-\\x1F]{1,4} "," ){500} "]"')
    schema = engine.grammar(json_schema={"type": "array", "items": {"type": "string"}, "minItems": 400})
    for name, grammar in (("GBNF", json_text), ("JSON schema", schema)):
        constraint, times = grammar.constraint(), []
        for token in engine.generate(ids, max_tokens=_TOKENS.value, grammar=grammar):
            begin = time.perf_counter()
            constraint.mask()
            times.append(time.perf_counter() - begin)
            constraint.advance(token.id)
        bound = decode_ms(engine, ids, grammar=grammar)
        print(
            f"{name}: a mask {1e3 * float(np.median(times)):.3f} ms (slowest {1e3 * max(times):.2f}), "
            f"a decode step {bound:.2f} ms with it, {decode:.2f} ms without"
        )


if __name__ == "__main__":
    app.run(main)
