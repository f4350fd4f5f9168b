"""Writes a GGUF file of a named model shape with random weights, in seconds, for benchmarks.

    python bench/synthetic.py --shape=8b --type=Q4_K --out=/dev/shm/8b.gguf

The blocks are random bits with scales such that weights have about zero mean and the spread of a trained layer,
so that activations stay finite. The text it makes is noise; its speed is that of a real model of the shape.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import json
import math
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from airjax.gguf import open_gguf

_POOL_BYTES = 32 << 20
_THREADS = 8


class _Part(NamedTuple):
    """`nbytes` at `at` of a file, taken from `pool` again and again, from `start` of it on."""

    at: int
    nbytes: int
    pool: np.ndarray
    start: int


class Shape(NamedTuple):
    """Sizes of a llama-architecture model, or with experts of the one that is named."""

    layers: int
    d_model: int
    d_ff: int
    heads: int
    kv_heads: int
    vocabulary: int
    context: int
    head_dim: int = 0
    experts: int = 0
    experts_used: int = 0
    architecture: str = "llama"

    @property
    def head_width(self) -> int:
        """Of one head."""
        return self.head_dim or self.d_model // self.heads


SHAPES = {
    "tiny": Shape(4, 256, 512, 4, 2, 512, 2048),
    # Can be cut for 2, 4 and 8 devices.
    "small": Shape(4, 2048, 2048, 16, 8, 2048, 2048),
    "1b": Shape(16, 2048, 8192, 32, 8, 128_256, 131_072),
    "8b": Shape(32, 4096, 14_336, 32, 8, 128_256, 131_072),
    "32b": Shape(64, 5120, 27_648, 40, 8, 152_064, 131_072),
    "70b": Shape(80, 8192, 28_672, 64, 8, 128_256, 131_072),
    "120b": Shape(88, 12_288, 28_672, 96, 8, 32_768, 131_072),
    "tiny-moe": Shape(4, 256, 256, 4, 2, 512, 2048, 64, 16, 3, "qwen3moe"),
    "30b-a3b": Shape(48, 2048, 768, 32, 4, 151_936, 40_960, 128, 128, 8, "qwen3moe"),
    # gpt-oss-120b: its experts in a type of blocks of 32 weights, the rest in Q8_0.
    "120b-a5b": Shape(36, 2880, 2880, 64, 8, 201_088, 131_072, 64, 128, 4, "gpt-oss"),
    "tiny-oss": Shape(4, 128, 128, 4, 2, 512, 2048, 32, 16, 3, "gpt-oss"),
}


_MIXED = (Type.Q4_0, Type.Q8_0, Type.Q4_K, Type.Q5_K, Type.Q6_K)
# Formats with one float16 scale, and where in a block it lies.
_ONE_SCALE = {
    Type.IQ4_NL: 0,
    Type.IQ4_XS: 0,
    Type.IQ3_S: 0,
    Type.IQ3_XXS: 0,
    Type.IQ2_S: 0,
    Type.IQ2_XS: 0,
    Type.IQ2_XXS: 0,
    Type.IQ1_S: 0,
    Type.TQ1_0: 52,
    Type.TQ2_0: 64,
}


def _fields(kind: Type, spread: float) -> list[tuple[int, float]]:
    """Byte offsets of a block's float16 scales, and the value each gets for weights of this spread."""
    if kind == Type.Q4_0:
        return [(0, spread / 4.6)]
    if kind == Type.Q8_0:
        return [(0, spread / 74.0)]
    if kind == Type.Q4_K:
        return [(0, spread / 255.0), (2, 7.5 * spread / 255.0)]
    if kind == Type.Q5_K:
        return [(0, spread / 520.0), (2, 15.5 * spread / 520.0)]
    if kind == Type.Q6_K:
        return [(208, spread / 1370.0)]
    if kind in _ONE_SCALE:
        at = _ONE_SCALE[kind]
        blocks = np.random.default_rng(0).integers(0, 256, (512, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
        blocks[:, at : at + 2] = np.frombuffer(np.float16(1).tobytes(), np.uint8)
        return [(at, spread / float(gguf.quants.dequantize(blocks, kind).std()))]
    known = ", ".join(t.name for t in (*_MIXED, *_ONE_SCALE))
    raise SystemExit(f"--type must be one of {known}, MXFP4, F16, BF16, F32, got {kind.name}")


def _pool(kind: Type, spread: float, generator: np.random.Generator) -> np.ndarray:
    """Random blocks, as bytes; a tensor takes them from a random offset on, again and again."""
    if kind in (Type.F32, Type.F16, Type.BF16):
        values = generator.normal(scale=spread, size=_POOL_BYTES // 4).astype(np.float32)
        if kind == Type.F16:
            return values.astype(np.float16).view(np.uint8)
        return (
            values.view(np.uint8)
            if kind == Type.F32
            else (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        )
    _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = generator.integers(0, 256, (_POOL_BYTES // block_bytes, block_bytes), np.uint8)
    if kind == Type.MXFP4:  # the exponent of a power of two; the values' own spread is 6.2
        blocks[:, 0] = 128 + round(np.log2(spread / 6.2))
        return blocks.reshape(-1)
    for offset, value in _fields(kind, spread):
        blocks[:, offset : offset + 2] = np.frombuffer(np.float16(value).tobytes(), np.uint8)
    return blocks.reshape(-1)


def _tensors(shape: Shape, kind: Type, output_kind: Type) -> list[tuple[str, tuple[int, ...], Type]]:
    d, f = shape.d_model, shape.d_ff
    q, kv = shape.head_width * shape.heads, shape.head_width * shape.kv_heads
    rows: list[tuple[str, tuple[int, ...], Type]] = [
        ("token_embd.weight", (shape.vocabulary, d), _embedding_kind(shape, kind)),
        ("output_norm.weight", (d,), Type.F32),
        ("output.weight", (shape.vocabulary, d), output_kind),
    ]
    for layer in range(shape.layers):
        if shape.experts:
            rows += _mixture(shape, layer, kind)
            continue
        rows += [
            (f"blk.{layer}.{name}.weight", size, Type.F32 if len(size) == 1 else kind)
            for name, size in (
                ("attn_norm", (d,)),
                ("attn_q", (q, d)),
                ("attn_k", (kv, d)),
                ("attn_v", (kv, d)),
                ("attn_output", (d, q)),
                ("ffn_norm", (d,)),
                ("ffn_gate", (f, d)),
                ("ffn_up", (f, d)),
                ("ffn_down", (d, f)),
            )
        ]
    return rows


def _embedding_kind(shape: Shape, kind: Type) -> Type:
    """Beside experts one that is as large as published files have it, and that gguf's own quantizer makes, since the
    embedding then carries what skews the routers."""
    if not shape.experts:
        return kind
    return Type.Q8_0 if shape.architecture == "gpt-oss" else Type.Q4_0


def _mixture(shape: Shape, layer: int, kind: Type) -> list[tuple[str, tuple[int, ...], Type]]:
    d, f, e, width = shape.d_model, shape.d_ff, shape.experts, shape.head_width
    q, kv = width * shape.heads, width * shape.kv_heads
    routed = {"ffn_gate_exps": (e, f, d), "ffn_up_exps": (e, f, d), "ffn_down_exps": (e, d, f)}
    dense = {"attn_q": (q, d), "attn_k": (kv, d), "attn_v": (kv, d), "attn_output": (d, q)}
    plain: dict[str, tuple[int, ...]] = {"attn_norm.weight": (d,), "ffn_gate_inp.weight": (e, d)}
    dense_kind = kind
    if shape.architecture == "gpt-oss":
        plain |= {"post_attention_norm.weight": (d,), "attn_sinks.weight": (shape.heads,)}
        biased = {**routed, **dense, "ffn_gate_inp": (e, d)}
        plain |= {f"{name}.bias": size[:-1] for name, size in biased.items()}
        dense_kind = Type.Q8_0
    else:
        plain |= {"ffn_norm.weight": (d,), "attn_q_norm.weight": (width,), "attn_k_norm.weight": (width,)}
    rows: list[tuple[str, tuple[int, ...], Type]] = [(name, size, Type.F32) for name, size in plain.items()]
    rows += [(f"{name}.weight", size, dense_kind) for name, size in dense.items()]
    rows += [(f"{name}.weight", size, kind) for name, size in routed.items()]
    return [(f"blk.{layer}.{name}", size, block) for name, size, block in rows]


def _add_metadata(writer: gguf.GGUFWriter, shape: Shape) -> None:
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.d_model)
    writer.add_feed_forward_length(shape.d_ff)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500_000.0)
    writer.add_rope_dimension_count(shape.head_width)
    if shape.experts:
        writer.add_key_length(shape.head_width)
        writer.add_value_length(shape.head_width)
        writer.add_expert_count(shape.experts)
        writer.add_expert_used_count(shape.experts_used)
        writer.add_expert_feed_forward_length(shape.d_ff)
    if shape.architecture == "gpt-oss":
        writer.add_sliding_window(128)
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(32.0)
        writer.add_rope_scaling_orig_ctx_len(4096)
    # Byte-level BPE whose first tokens are the 256 bytes as GPT-2 spells them; the others never arise from text.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    spelling = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    tokens = [spelling[byte] for byte in range(256)] + ["<|end|>", "ab"]
    tokens += [f"token{i}" for i in range(len(tokens), shape.vocabulary)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 256 + [3] + [1] * (shape.vocabulary - 257))
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(256)
    writer.add_bos_token_id(256)


def write_header(
    path: str, shape: Shape, kind: Type, output_kind: Type | None = None
) -> tuple[list[tuple[str, tuple[int, ...], Type]], list[int]]:
    """Writes metadata and tensor table alone.

    Args:
      path: where.
      shape: sizes of the model.
      kind: block type of the layers and the embedding.
      output_kind: of the output matrix; None for Q6_K beside a K-quant, else `kind`.

    Returns:
      Name, shape and block type of each tensor, and its bytes.
    """
    if output_kind is None:
        output_kind = Type.Q6_K if kind.name.endswith("_K") else kind
        output_kind = Type.Q8_0 if shape.architecture == "gpt-oss" else output_kind
    writer = gguf.GGUFWriter(path, shape.architecture)
    _add_metadata(writer, shape)
    tensors = _tensors(shape, kind, output_kind)
    sizes = []
    for name, size, block in tensors:
        block_size, block_bytes = gguf.GGML_QUANT_SIZES[block]
        nbytes = int(np.prod(size)) // block_size * block_bytes
        sizes.append(nbytes)
        writer.add_tensor_info(name, size, np.dtype(np.float32), nbytes, raw_dtype=block)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return tensors, sizes


def write_sparse(path: str, shape: Shape, kind: Type) -> int:
    """Writes a file that has a shape's header and a hole where its weights would be: enough to plan with.

    Returns:
      Its length, of which the disk holds the header alone.
    """
    _, sizes = write_header(path, shape, kind)
    begin = os.path.getsize(path)
    length = begin + -begin % 32 + sum(nbytes + -nbytes % 32 for nbytes in sizes)
    os.truncate(path, length)
    return length


def write(
    path: str, shape: Shape, kind: Type, output_kind: Type | None = None, seed: int = 0, skew: float = 0.0
) -> int:
    """Writes the file.

    With experts, one place of the hidden states holds the same number for every token and in every layer, and the
    router's weights for it skew its choice: a logit is normal noise of the token, plus `-skew * log(rank)`, where each
    layer has its own order of experts. 0 makes all choices equally likely; what comes of another is measured.

    Args:
      path: where.
      shape: sizes of the model.
      kind: block type of the layers and the embedding.
      output_kind: as `write_header` has it.
      seed: of the weights.
      skew: of the routers.

    Returns:
      Bytes written.
    """
    generator = np.random.default_rng(seed)
    tensors, sizes = write_header(path, shape, kind, output_kind)
    ones = np.ones(max(shape.d_model, shape.head_width), np.float32).view(np.uint8)
    kinds = sorted({block for _, size, block in tensors if len(size) > 1})
    pools = {block: _pool(block, shape.d_model**-0.5, generator) for block in kinds}
    # Attention adds much the same to every token, which would skew the routers by itself.
    quiet = {block: _pool(block, 0.1 * shape.d_model**-0.5, generator) for block in kinds if shape.experts}
    zeros = np.zeros(4096, np.uint8)
    parts: list[_Part] = []
    silent: list[_Part] = []
    at = os.path.getsize(path)
    at += -at % 32
    for (name, size, block), nbytes in zip(tensors, sizes, strict=True):
        pool, start = ones, 0
        adds = shape.experts and name.endswith(("attn_output.weight", "ffn_down_exps.weight"))
        if name.endswith((".bias", "attn_sinks.weight")):
            pool = zeros
        elif name.endswith("ffn_gate_inp.weight"):
            pool = _router(shape, skew, generator)
        elif shape.experts and name == "token_embd.weight":
            pool = _constant_place(shape, block, generator)
        elif len(size) > 1:
            pool = quiet[block] if adds else pools[block]
            _, block_bytes = gguf.GGML_QUANT_SIZES[block]
            start = int(generator.integers(0, pool.size // block_bytes)) * block_bytes
        parts.append(_Part(at, nbytes, pool, start))
        if adds:
            silent += _silent_rows(at, size, block)
        at += nbytes + -nbytes % 32
    _write_parts(Path(path), parts, at)
    # What adds to the hidden states leaves their first place alone.
    _write_parts(Path(path), silent, at)
    return at


def skew_routers(path: str, shape: Shape, skew: float, seed: int = 0) -> None:
    """Gives the routers of a file that `write` wrote other random weights, of this skew; all else stays.

    Args:
      path: of the file.
      shape: that it was written with.
      skew: of the routers, as in `write`.
      seed: of their weights.
    """
    generator = np.random.default_rng(seed)
    with open_gguf(path) as file:
        routers = [info for name, info in file.tensors.items() if name.endswith("ffn_gate_inp.weight")]
    parts = [_Part(info.offset, info.nbytes, _router(shape, skew, generator), 0) for info in routers]
    _write_parts(Path(path), parts, os.path.getsize(path))


# What the constant place of the hidden states holds, beside numbers of unit spread.
_CONSTANT = 8.0


def _router(shape: Shape, skew: float, generator: np.random.Generator) -> np.ndarray:
    """Weights of a router, as bytes."""
    d = shape.d_model
    weights = generator.normal(scale=d**-0.5, size=(shape.experts, d)).astype(np.float32)
    bias = -skew * np.log(1 + generator.permutation(shape.experts))
    # After the norm the place holds the constant over the root of the mean square, about 1.
    weights[:, 0] = (bias - bias.max()) / _CONSTANT
    return weights.view(np.uint8).reshape(-1)


def _constant_place(shape: Shape, kind: Type, generator: np.random.Generator) -> np.ndarray:
    """Whole rows of an embedding, as bytes. The constant is the largest number of its block, so it is exact."""
    rows = generator.normal(size=(4096, shape.d_model)).clip(-_CONSTANT / 2, _CONSTANT / 2).astype(np.float32)
    rows[:, 0] = _CONSTANT
    return gguf.quants.quantize(rows, kind).reshape(-1)


def _silent_rows(at: int, size: tuple[int, ...], kind: Type) -> list[_Part]:
    """Zeros for the first row of each matrix of a tensor that begins at `at`."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    row_bytes = size[-1] // block * block_bytes
    zeros = np.zeros(row_bytes, np.uint8)
    matrices = size[0] if len(size) == 3 else 1
    return [_Part(at + matrix * size[-2] * row_bytes, row_bytes, zeros, 0) for matrix in range(matrices)]


def write_hf(folder: Path, shape: Shape, seed: int = 0) -> int:
    """Writes the same shape as a bfloat16 checkpoint for transformers, one safetensors file per layer.

    Args:
      folder: made if need be.
      shape: sizes of the model.
      seed: of the weights, which are not those of `write`.

    Returns:
      Bytes of weights written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pool = _pool(Type.BF16, shape.d_model**-0.5, np.random.default_rng(seed))
    d, f = shape.d_model, shape.d_ff
    kv = d // shape.heads * shape.kv_heads
    files: list[dict[str, tuple[int, ...]]] = [{"model.embed_tokens.weight": (shape.vocabulary, d)}]
    for layer in range(shape.layers):
        sizes: dict[str, tuple[int, ...]] = {
            "self_attn.q_proj": (d, d),
            "self_attn.k_proj": (kv, d),
            "self_attn.v_proj": (kv, d),
            "self_attn.o_proj": (d, d),
            "mlp.gate_proj": (f, d),
            "mlp.up_proj": (f, d),
            "mlp.down_proj": (d, f),
            "input_layernorm": (d,),
            "post_attention_layernorm": (d,),
        }
        files.append({f"model.layers.{layer}.{name}.weight": size for name, size in sizes.items()})
    files += [{"model.norm.weight": (d,)}, {"lm_head.weight": (shape.vocabulary, d)}]
    index: dict[str, str] = {}
    total = 0
    for number, tensors in enumerate(files, 1):
        name = f"model-{number:05}-of-{len(files):05}.safetensors"
        index |= dict.fromkeys(tensors, name)
        total += _write_safetensors(folder / name, tensors, pool)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )
    (folder / "config.json").write_text(json.dumps(_hf_config(shape)))
    tokens = {f"token{i}": i for i in range(256)}
    model = {"type": "WordLevel", "vocab": tokens, "unk_token": "token0"}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "token0"})
    )
    return total


def _hf_config(shape: Shape) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.d_model,
        "intermediate_size": shape.d_ff,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": shape.context,
        "rope_theta": 500_000.0,
        "rms_norm_eps": 1e-5,
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 0,
        "tie_word_embeddings": False,
    }


def _write_safetensors(path: Path, tensors: dict[str, tuple[int, ...]], pool: np.ndarray) -> int:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, size in tensors.items():
        end = at + 2 * math.prod(size)
        header[name] = {"dtype": "BF16", "shape": size, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    ones = np.full(max(size[0] for size in tensors.values()), 0x3F80, np.uint16).view(np.uint8)
    parts = [
        _Part(
            8 + len(text) + header[name]["data_offsets"][0],
            2 * math.prod(size),
            ones if len(size) == 1 else pool,
            0,
        )
        for name, size in tensors.items()
    ]
    _write_parts(path, parts, 8 + len(text) + at)
    return at


def _write_parts(path: Path, parts: list[_Part], nbytes: int) -> None:
    """Writes the parts side by side: one thread alone is far slower than memory."""
    with open(path, "r+b", buffering=0) as file, concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        file.truncate(nbytes)
        list(pool.map(functools.partial(_write_part, file.fileno()), parts))


def _write_part(file: int, part: _Part) -> None:
    at, end, start = part.at, part.at + part.nbytes, part.start
    while at < end:
        at += os.pwrite(file, part.pool[start : start + end - at].data, at)
        start = 0


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=sorted(SHAPES), required=True)
    parser.add_argument("--type", choices=[t.name for t in Type], default="Q4_K")
    parser.add_argument("--out", required=True)
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--skew", type=float, default=0.0, help="of the routers of a mixture of experts")
    args = parser.parse_args()
    shape = SHAPES[args.shape]
    if args.layers:
        shape = shape._replace(layers=args.layers)
    begin = time.perf_counter()
    nbytes = write(args.out, shape, Type[args.type], seed=args.seed, skew=args.skew)
    seconds = time.perf_counter() - begin
    print(f"{args.out}: {nbytes / 2**30:.2f} GiB in {seconds:.1f} s")


if __name__ == "__main__":
    main()
