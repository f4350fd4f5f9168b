"""A model of random weights writes under random JSON schemas; every text must validate.

    PYTHONPATH=tests/support python bench/schemas.py --count=1000

Needs the extra `test`: the schemas and the model are those of the tests. Exits with 1 if a text does not validate.
"""

from __future__ import annotations

import importlib
import json
import random
import sys
import tempfile
import time
from pathlib import Path

from absl import app, flags

import airjax
from airjax import sampling

_COUNT = flags.DEFINE_integer("count", 1000, "Schemas.")
_SEED = flags.DEFINE_integer("seed", 1, "Of the schemas.")
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 500, "Of each text.")


def main(argv: list[str]) -> None:
    """Runs and prints."""
    del argv
    validators = importlib.import_module("jsonschema")
    random_schema = importlib.import_module("random_schemas").random_schema
    toys = importlib.import_module("toy_models")
    chance = random.Random(_SEED.value)
    schemas = [random_schema(chance) for _ in range(_COUNT.value)]
    with tempfile.TemporaryDirectory() as folder:
        path = toys.toy_gemma3(Path(folder) / "toy.gguf", layers=1)
        with airjax.load(path, context=512, max_batch=32) as engine:
            begin = time.perf_counter()
            grammars = [engine.grammar(json_schema=schema) for schema in schemas]
            print(f"{len(schemas)} schemas compiled in {time.perf_counter() - begin:.2f} s")
            # Hot, since a number may have digits without end and such a model likes to repeat itself.
            sampler = sampling.chain(sampling.top_k(50), sampling.temperature(6.0))
            texts = [""] * len(schemas)
            tokens = 0
            prompts = [[1, 5 + n % 200] for n in range(len(schemas))]
            for n, token in engine.generate_batch(
                prompts, samplers=sampler, grammars=grammars, max_tokens=_MAX_TOKENS.value
            ):
                texts[n] += token.text
                tokens += 1
            print(f"{tokens} tokens in {time.perf_counter() - begin:.0f} s")
    wrong = 0
    for schema, text in zip(schemas, texts, strict=True):
        try:
            validators.Draft202012Validator(
                schema, format_checker=validators.Draft202012Validator.FORMAT_CHECKER
            ).validate(json.loads(text))
        except (json.JSONDecodeError, validators.ValidationError) as error:
            wrong += 1
            print(f"{json.dumps(schema)}\n  gave {text!r}\n  {str(error).splitlines()[0]}")
    print(f"{len(schemas) - wrong} of {len(schemas)} texts validate")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    app.run(main)
