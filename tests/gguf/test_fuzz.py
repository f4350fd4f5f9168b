"""A seeded slice of the fuzz, and the headers that it, or reading the code, once found wrongly handled."""

import importlib.util
import random
from pathlib import Path
from types import ModuleType

import gguf_bytes as raw
import numpy as np
import pytest

from airjax.gguf import GGUFError
from airjax.gguf.header import parse_header


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The fuzz as a module."""
    spec = importlib.util.spec_from_file_location("fuzz_header", Path(__file__).with_name("fuzz_header.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def array(item: int, count: int, content: bytes = b"") -> bytes:
    """A metadata entry "a" that claims `count` items."""
    return raw.string("a") + raw.u32(raw.ARRAY) + raw.u32(item) + raw.u64(count) + content


# What is wrong with it, and the file.
CORPUS = [
    (
        "a string array whose last length is cut by the end of the file",
        raw.build([array(raw.STRING, 3, raw.string("") + raw.string("12345") + b"abc")], alignment=1),
    ),
    (
        "a string array cut inside its first length",
        raw.build([array(raw.STRING, 2, raw.string("123456789012") + b"1234567")], alignment=1),
    ),
    ("a boolean alignment", raw.build([raw.entry("general.alignment", raw.BOOL, True)])),
    ("a whole number of alignment as a float", raw.build([raw.entry("general.alignment", raw.F64, 32.0)])),
    (
        "an alignment of a long array",
        raw.build([raw.entry("general.alignment", raw.ARRAY, (raw.U8, [1] * 9999))]),
    ),
    ("an empty nested array of a claimed million", raw.build([array(raw.ARRAY, 1 << 20, bytes(12 << 20))])),
    ("a string length that wraps 64 bits", raw.build([array(raw.STRING, 1, raw.u64(2**64 - 8))])),
    ("an offset that wraps 64 bits", raw.build([], [raw.tensor("w", offset=2**64 - 32)], bytes(64))),
    ("a shape whose product wraps 64 bits", raw.build([], [raw.tensor("w", (2**32, 2**32))], bytes(64))),
    ("a shape whose bytes wrap 64 bits", raw.build([], [raw.tensor("w", (2**61 + 8,))], bytes(64))),
]


@pytest.mark.parametrize("data", [data for _, data in CORPUS], ids=[name for name, _ in CORPUS])
def test_the_regression_corpus_is_refused(data):
    with pytest.raises(GGUFError) as caught:
        parse_header(memoryview(data), "m.gguf", 0)
    assert len(str(caught.value)) < 300


def test_a_seeded_slice_lets_only_the_one_error_out(script):
    tally = script.fuzz(2000, [script.synthetic_seed()], [1.0], random_seed=7)
    assert tally.accepted + tally.refusals.total() == 2000
    assert tally.accepted > 100  # mutations that only change a value
    assert len(tally.refusals) > 30  # and those that reach deep into the parser


def test_a_seeded_slice_over_a_real_header(script, smollm2):
    whole, short = script.real_seeds(smollm2)
    tally = script.fuzz(1000, [whole, short], [0.02, 0.98], random_seed=8)
    assert tally.accepted + tally.refusals.total() == 1000
    assert len(tally.refusals) > 30


def test_the_fuzz_sees_an_escaping_error_and_excess(script, monkeypatch):
    def escapes(*_: object) -> None:
        raise IndexError("escaped")

    seed = script.synthetic_seed()
    with monkeypatch.context() as patch:
        patch.setattr(script, "parse_header", escapes)
        with pytest.raises(AssertionError, match=r"case 0 of synthetic.*escaped"):
            script.fuzz(1, [seed], [1.0], 0)
    monkeypatch.setattr(script, "MAX_PEAK_BYTES", 100)
    with pytest.raises(AssertionError, match="bytes"):
        script.fuzz(1, [seed], [1.0], 0)


def test_mutations_are_those_of_their_random_seed(script):
    seed = script.synthetic_seed()
    fields = script.length_fields(seed.header)
    first, again = (
        [script.mutate(rng, seed, fields) for _ in range(50)] for rng in (random.Random(1), random.Random(1))
    )
    assert first == again
    assert len({data for data, _ in first}) > 40


def test_random_bytes_after_the_magic():
    rng = np.random.default_rng(3)
    for _ in range(2000):
        data = b"GGUF" + raw.u32(3) + raw.u64(2) + raw.u64(2) + rng.integers(0, 3, 120, np.uint8).tobytes()
        with pytest.raises(GGUFError):
            parse_header(memoryview(data), "m.gguf", 0)
