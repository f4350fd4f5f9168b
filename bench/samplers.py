"""What samplers cost beside a decode step, and what grammar masks cost beside a sweep.

    python bench/samplers.py --model=SMOLLM2.gguf

Prints a table: each sampler's time in a jitted step with its draw, less that of the draw from bare logits, and its
share of the model's decode step; then the time of a mask on the host, and of a decode step with and without a grammar.
All are measured in turns, and each time is the fastest tenth's, so that what else the machine does counts little.
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
_ROUNDS = flags.DEFINE_integer("rounds", 10, "Turns of everything.")
_STEPS = flags.DEFINE_integer("steps", 30, "Steps of each sampler, and decoded tokens, in a turn.")

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


class Sampler:
    """A sampler in its step, with the times of its steps in seconds."""

    def __init__(self, transform: sampling.Transform, rows: np.ndarray, context: np.ndarray) -> None:
        self._apply = transform.apply
        self._state = transform.init(context, rows.shape[1])
        self._token = jnp.asarray(context[:, -1])
        self._rows = [jax.device_put(row[None]) for row in rows]
        self.times: list[float] = []
        self.turn(1)
        self.times.clear()  # the first one compiled

    def turn(self, steps: int) -> None:
        """Draws over different logits, the state carried along."""
        for at in range(steps):
            key = jax.block_until_ready(jax.random.key(at))
            begin = time.perf_counter()
            drawn = step(self._apply, self._rows[at % len(self._rows)], self._state, self._token, key)
            self._token, _, self._state = jax.block_until_ready(drawn)
            self.times.append(time.perf_counter() - begin)


class Slow:
    """A constraint that allows everything, and whose mask takes its time without using the processor."""

    finished = False

    def __init__(self, vocab: int, seconds: float) -> None:
        self._mask = np.full(-(-vocab // 32), 0xFFFFFFFF, np.uint32)
        self._seconds = seconds

    def mask(self) -> np.ndarray:
        """All bits, later."""
        time.sleep(self._seconds)
        return self._mask

    def advance(self, token: int) -> None:
        """Nothing to note."""


class Decoding:
    """Generations, with the mean time of the tokens of each in seconds."""

    def __init__(self, engine: airjax.Engine, ids: list[int], **options: Any) -> None:
        self._engine, self._ids, self._options = engine, ids, options
        self.times: list[float] = []
        self.turn(2)
        self.turn(_STEPS.value)
        self.first = self.times[1:]
        self.times.clear()

    def turn(self, steps: int) -> None:
        """Decodes `steps` tokens."""
        for _ in self._engine.generate(self._ids, max_tokens=steps, ignore_eos=True, **self._options):
            pass
        stats = self._engine.stats
        self.times.append(stats.decode_s / max(stats.generated_tokens - 1, 1))


def fastest_ms(times: list[float]) -> float:
    """Milliseconds that the fastest tenth stays below."""
    return 1e3 * float(np.quantile(times, 0.1))


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
        bare = Sampler(sampling.chain(), rows, context)
        settings: dict[str, dict[str, Any]] = {"standard(), all off": {}}
        settings |= {str(one)[1:-1]: one for one in ALONE} | {"full chain": FULL}
        samplers = {
            name: Sampler(sampling.standard(**one, key=key), rows, context) for name, one in settings.items()
        }
        grammars = {
            "GBNF": engine.grammar(gbnf='root ::= "[" ( [^"\\x00-\\x1F]{1,4} "," ){500} "]"'),
            "JSON schema": engine.grammar(
                json_schema={"type": "array", "items": {"type": "string"}, "minItems": 400}
            ),
        }
        plain = Decoding(engine, ids)
        bound = {name: Decoding(engine, ids, grammar=grammar) for name, grammar in grammars.items()}
        half = min(plain.first) / 2
        slow = Decoding(engine, ids, constraint=Slow(rows.shape[1], half))
        for _ in range(_ROUNDS.value):
            for decoding in (plain, slow, *bound.values()):
                decoding.turn(_STEPS.value)
            for sampler in (bare, *samplers.values()):
                sampler.turn(_STEPS.value)
        decode, draw = fastest_ms(plain.times), fastest_ms(bare.times)
        print(f"{jax.devices()[0].device_kind}, V = {rows.shape[1]}, a decode step {decode:.2f} ms")
        print(f"{'a draw from bare logits':32s} {draw:7.3f} ms {100 * draw / decode:6.2f} %")
        for name, sampler in samplers.items():
            ms = fastest_ms(sampler.times) - draw
            print(f"{name[:32]:32s} {ms:7.3f} ms {100 * ms / decode:6.2f} %")
        print(
            f"a mask that takes {1e3 * half:.2f} ms: a decode step {fastest_ms(slow.times):.2f} ms with it, "
            f"{decode:.2f} ms without"
        )
        for name, grammar in grammars.items():
            constraint, times = grammar.constraint(), []
            for token in engine.generate(ids, max_tokens=_STEPS.value, grammar=grammar):
                begin = time.perf_counter()
                constraint.mask()
                times.append(time.perf_counter() - begin)
                constraint.advance(token.id)
            print(
                f"{name}: a mask {1e3 * float(np.median(times)):.3f} ms (slowest {1e3 * max(times):.2f}), "
                f"a decode step {fastest_ms(bound[name].times):.2f} ms with it, {decode:.2f} ms without"
            )


if __name__ == "__main__":
    app.run(main)
