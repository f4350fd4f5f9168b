"""Writes the tokenizer golden files: what llama.cpp answers, through llama-cpp-python.

    python tests/golden/make_tokenizer_goldens.py SMOLLM2.gguf GEMMA3.gguf

The models are SmolLM2-135M-Instruct and Gemma 3 270M, as the tests find them; only their vocabularies
are read.
The toy vocabularies are written to temporary files. Needs the packages gguf and llama-cpp-python.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf
import llama_cpp

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent), str(ROOT / "tests" / "support")]

from tokenizer_strings import CUT_STRINGS, HARD_STRINGS  # noqa: E402
from toy_vocabularies import pairs_metadata, spm_metadata, spm_texts  # noqa: E402

from airjax.text.pretokenizers import PRETOKENIZERS, PreTokenizer  # noqa: E402

HERE = Path(__file__).parent


def main() -> None:
    smollm2, gemma3 = sys.argv[1:]
    for name, path in (("smollm2", smollm2), ("gemma3", gemma3)):
        write(f"tokenizer_{name}.json", describe(path, HARD_STRINGS, piece_step=199))
    with tempfile.TemporaryDirectory() as folder:
        toy = Path(folder) / "toy.gguf"
        write_vocabulary(spm_metadata(), toy)
        write("tokenizer_toy_spm.json", describe(str(toy), spm_texts(), piece_step=1))
        families: dict[PreTokenizer, Any] = {}
        for pre, rule in PRETOKENIZERS.items():
            if not pre:
                continue
            write_vocabulary(pairs_metadata(pre, CUT_STRINGS), toy)
            ids = [tokenize(vocabulary(str(toy)), text, True, False) for text in CUT_STRINGS]
            family = families.setdefault(rule, {"names": [], "ids": ids})
            if family["ids"] != ids:
                raise SystemExit(f"{pre} does not cut like {family['names'][0]}: give it a rule of its own")
            family["names"].append(pre)
        write("tokenizer_pre.json", {"texts": CUT_STRINGS, "families": list(families.values())})


def vocabulary(path: str) -> Any:
    """Loads the vocabulary of a GGUF file alone; the model stays alive for as long as the process."""
    parameters = llama_cpp.llama_model_default_params()
    parameters.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(path.encode(), parameters)
    if not model:
        raise SystemExit(f"llama.cpp cannot load {path}")
    return llama_cpp.llama_model_get_vocab(model)


def tokenize(vocab: Any, text: str, add_special: bool, parse_special: bool) -> list[int]:
    # A lone surrogate has no UTF-8: U+FFFD stands for it, and a pair of them for its character.
    raw = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
    room = len(raw) + 16
    ids = (llama_cpp.llama_token * room)()
    count = llama_cpp.llama_tokenize(vocab, raw, len(raw), ids, room, add_special, parse_special)
    return list(ids[:count])


def piece(vocab: Any, token: int, special: bool) -> bytes:
    buffer = ctypes.create_string_buffer(512)
    size = llama_cpp.llama_token_to_piece(vocab, token, buffer, len(buffer), 0, special)
    return buffer.raw[:size]


def describe(path: str, texts: list[str], piece_step: int) -> dict[str, Any]:
    vocab = vocabulary(path)
    size = llama_cpp.llama_vocab_n_tokens(vocab)
    shown = sorted({*range(min(size, 300)), *range(0, size, piece_step), size - 1})
    return {
        "vocab_size": size,
        "bos_id": llama_cpp.llama_vocab_bos(vocab),
        "eos_id": llama_cpp.llama_vocab_eos(vocab),
        "eog_ids": [token for token in range(size) if llama_cpp.llama_vocab_is_eog(vocab, token)],
        "cases": [
            {
                "text": text,
                "ids": tokenize(vocab, text, True, False),
                "bare_ids": tokenize(vocab, text, False, False),
                "special_ids": tokenize(vocab, text, False, True),
            }
            for text in texts
        ],
        "pieces": {token: piece(vocab, token, True).hex() for token in shown},
        "hidden": [token for token in shown if piece(vocab, token, True) and not piece(vocab, token, False)],
    }


def write_vocabulary(metadata: dict[str, Any], path: Path) -> None:
    """Writes a GGUF file that holds a vocabulary and no tensors."""
    writer = gguf.GGUFWriter(path, metadata["general.architecture"])
    for key, value in metadata.items():
        if key == "general.architecture":
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_array(key, value if isinstance(value, list) else value.tolist())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def write(name: str, content: dict[str, Any]) -> None:
    made = {
        "made_with": {"llama-cpp-python": llama_cpp.__version__, "gguf": importlib.metadata.version("gguf")},
        **content,
    }
    (HERE / name).write_text(json.dumps(made, separators=(",", ":")) + "\n")
    print(name)


if __name__ == "__main__":
    main()
