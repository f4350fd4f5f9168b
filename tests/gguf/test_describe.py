"""The description of a file: plain values, short, and complete."""

import json
from pathlib import Path

import gguf_bytes as raw
import pytest

from airjax.gguf import build_manifest, describe, format_description, open_gguf


def description(path: Path) -> dict:
    """Of the file."""
    with open_gguf(path) as file:
        return describe(file, build_manifest(file))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A file with every value type."""
    path = tmp_path / "m.gguf"
    path.write_bytes(raw.every_value_type())
    return path


def test_it_is_json_whatever_the_value_types(model):
    described = description(model)
    assert json.loads(json.dumps(described)) == described


def test_metadata_in_full_but_arrays_shortened(model):
    metadata = description(model)["metadata"]
    assert metadata["text"] == "grüße 🙂"
    assert metadata["u64"] == 2**64 - 1
    assert metadata["array.7"] == [False, True, True]
    assert metadata["array.none"] == metadata["array.no_strings"] == []
    assert metadata["array.nested"] == [[1, 2], ["x", "y"], [[7]]]


def test_a_long_array_shows_its_length_and_its_first_items(tmp_path):
    path = tmp_path / "m.gguf"
    names = [f"token {n}" for n in range(1000)]
    path.write_bytes(
        raw.build(
            [
                raw.entry("names", raw.ARRAY, (raw.STRING, names)),
                raw.entry("kinds", raw.ARRAY, (raw.I32, list(range(5)))),
                raw.entry("exact", raw.ARRAY, (raw.I32, list(range(4)))),
                raw.entry("template", raw.STRING, "line\nnext " * 100),
            ]
        )
    )
    described = description(path)
    assert described["metadata"]["names"] == {"length": 1000, "first": names[:4]}
    assert described["metadata"]["kinds"] == {"length": 5, "first": [0, 1, 2, 3]}
    assert described["metadata"]["exact"] == [0, 1, 2, 3]
    text = format_description(described)
    assert "  names = ['token 0', 'token 1', 'token 2', 'token 3', ...] (1000 items)" in text
    assert "  exact = [0, 1, 2, 3]" in text
    assert "(1000 characters)" in text
    assert max(map(len, text.splitlines())) < 160


def test_tensors_types_and_spans(model):
    described = description(model)
    assert described["files"] == [str(model)]
    assert (described["version"], described["alignment"]) == (3, 32)
    assert described["types"] == {
        "Q8_0": {"tensors": 1, "bytes": 102},
        "F32": {"tensors": 1, "bytes": 32},
        "F16": {"tensors": 1, "bytes": 48},
    }
    with open_gguf(model) as file:
        offset = file.tensors["blk.0.attn_q.weight"].offset
    assert described["tensors"][2] == {
        "name": "blk.0.attn_q.weight",
        "type": "F16",
        "shape": [2, 3, 4],
        "file": 0,
        "offset": offset,
        "bytes": 48,
    }
    layer, embedding = described["spans"]
    assert layer["name"] == "blk.0"
    assert embedding["name"] == "token_embd.weight"
    assert layer["bytes"] - layer["waste_bytes"] == 80
    assert layer["pages"] == [[0, 0, 4096]]


def test_equal_layers_share_a_layout_number(tmp_path):
    path = tmp_path / "m.gguf"
    sizes = (16, 16, 32)
    rows = [raw.tensor(f"blk.{n}.w", (size,), offset=64 * n) for n, size in enumerate(sizes)]
    path.write_bytes(raw.build([], rows, bytes(256), alignment=64))
    with open_gguf(path) as file:
        described = describe(file, build_manifest(file, align=1))
    assert [span["layout"] for span in described["spans"]] == [0, 0, 1]
    assert described["layer_layouts"] == 2


def test_a_split_model_names_each_file(tmp_path):
    paths = [tmp_path / f"m-0000{n}-of-00002.gguf" for n in (1, 2)]
    for path, name in zip(paths, "ab", strict=True):
        path.write_bytes(raw.build([], [raw.tensor(name)], bytes(32)))
    described = description(paths[1])
    assert described["files"] == [str(path) for path in paths]
    assert [tensor["file"] for tensor in described["tensors"]] == [0, 1]
    assert format_description(described).splitlines()[:2] == [f"{path}  (GGUF version 3)" for path in paths]


def test_the_text_names_every_key_tensor_and_span(model):
    described = description(model)
    text = format_description(described)
    for key in described["metadata"]:
        assert f"  {key} = " in text
    for tensor in described["tensors"]:
        assert tensor["name"] in text
    assert "spans (1 layouts of layers)" in text
    assert "2 x 3 x 4" in text


def test_text_from_the_file_steers_no_terminal(tmp_path):
    hostile = "x\x1b[31m\r\n\u202ey"
    path = tmp_path / "m.gguf"
    entries = [
        raw.entry(hostile, raw.STRING, hostile * 50),
        raw.entry("strings", raw.ARRAY, (raw.STRING, [hostile, "z" * 5000])),
        raw.entry("nested", raw.ARRAY, (raw.ARRAY, [(raw.STRING, [hostile])])),
    ]
    path.write_bytes(raw.build(entries, [raw.tensor(f"blk.0.{hostile}")], bytes(32)))
    described = description(path)
    assert described["metadata"][hostile] == hostile * 50  # JSON escapes by itself
    text = format_description(described)
    assert all(character.isprintable() for character in text.replace("\n", ""))
    assert r"blk.0.x\x1b[31m\r\n\u202ey" in text
    assert max(map(len, text.splitlines())) < 300


def test_numbers_that_json_lacks_are_written_as_words(tmp_path):
    path = tmp_path / "m.gguf"
    numbers = [float("nan"), float("inf"), float("-inf"), 1.5]
    path.write_bytes(
        raw.build([raw.entry("a", raw.F64, numbers[0]), raw.entry("b", raw.ARRAY, (raw.F32, numbers))])
    )
    described = description(path)
    assert described["metadata"] == {"a": "nan", "b": ["nan", "inf", "-inf", 1.5]}
    json.dumps(described, allow_nan=False)


def test_a_file_with_nothing_in_it(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(raw.build())
    assert "tensors" in format_description(description(path))


def test_a_real_model(gemma3):
    described = description(gemma3)
    assert described["metadata"]["tokenizer.ggml.tokens"]["length"] == 262144
    assert sum(entry["tensors"] for entry in described["types"].values()) == len(described["tensors"])
    assert len(json.dumps(described)) < 200_000
