"""Writes a GGUF file anew with all weights in float32: the same model, and up to eight times the bytes to stream.

    python bench/widen.py --model=M.gguf --out=/dev/shm/wide.gguf

A small real model passes the link faster than its layers can be given to a GPU; with more bytes a layer the link
decides again, as it does for a large one. Metadata, tokenizer and the weights' values stay what they are.
"""

from __future__ import annotations

import argparse

import gguf
import numpy as np


def widen(source: str, target: str) -> int:
    """Writes the file; its bytes of weights."""
    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, architecture)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        inner = field.types[-1] if field.types[0] is gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], inner)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    total = 0
    for tensor in reader.tensors:
        wide = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        writer.add_tensor(tensor.name, wide.reshape(tuple(reversed(tensor.shape.tolist()))))
        total += wide.nbytes
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return total


def main() -> None:
    """Reads the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    print(f"{options.out}: {widen(options.model, options.out) / 2**30:.2f} GiB of weights")


if __name__ == "__main__":
    main()
