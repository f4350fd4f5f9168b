"""Tiny models with random weights as GGUF files, the same bytes for the same options."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as GGMLType
from random_blocks import random_rows
from toy_vocabularies import pairs_metadata, spm_metadata

# Where a block's scale lies in its bytes, and for a format with minima how many scales a minimum is worth for
# weights of mean zero.
_SCALE_AT = {"Q2_K": 80, "Q3_K": 108, "Q4_K": 0, "Q5_K": 0, "Q6_K": 208}
_MINIMUM = {"Q2_K": 1.5, "Q4_K": 7.5, "Q5_K": 15.5}


def toy_llama(
    path: Path,
    *,
    block_type: str = "F32",
    separate_output: bool = False,
    rope_factors: bool = False,
    linear_factor: float = 1.0,
    heads: int = 4,
    kv_heads: int = 2,
    head_width: int | None = None,
    attention_biases: bool = False,
    mlp_biases: bool = False,
    layers: int = 4,
    seed: int = 0,
) -> Path:
    """Writes a llama; the rows of its q and k are in the order for rope on neighbours.

    Args:
      path: the file.
      block_type: of all matrices.
      separate_output: an output matrix of its own, else the embedding is used twice.
      rope_factors: a divisor for each rope frequency, as llama 3.1 has.
      linear_factor: of rope scaling; 1 for none.
      heads: of the queries.
      kv_heads: of the keys and values.
      head_width: other than the model's width divided by the heads.
      attention_biases: q, k, v and the output of attention have biases.
      mlp_biases: gate, up and down have biases.
      layers: how many.
      seed: of the weights.
    """
    wide = wide_blocks(block_type)
    d, f = (256, 512) if wide else (64, 128)
    width = head_width or d // heads
    toy = Toy(path, "llama", pairs_metadata("default", ["abcdefghijklmno "]), GGMLType[block_type], seed)
    toy.sizes(layers, d, f, heads, kv_heads, context=512)
    toy.value("rope.freq_base", 10_000.0)
    toy.value("rope.dimension_count", width)
    if head_width is not None:
        toy.value("attention.key_length", width)
        toy.value("attention.value_length", width)
    if linear_factor != 1:
        toy.value("rope.scaling.type", "linear")
        toy.value("rope.scaling.factor", linear_factor)
    toy.outside(d, separate_output)
    if rope_factors:
        toy.tensor("rope_freqs.weight", np.linspace(1, 8, width // 2))
    q, kv = heads * width, kv_heads * width
    for layer in range(layers):
        for name, rows, columns, gain in (
            ("attn_q", q, d, 1.5),
            ("attn_k", kv, d, 1.5),
            ("attn_v", kv, d, 1.0),
            ("attn_output", d, q, 1.0),
            ("ffn_gate", f, d, 1.0),
            ("ffn_up", f, d, 1.0),
            ("ffn_down", d, f, 1.0),
        ):
            toy.matrix(f"blk.{layer}.{name}.weight", rows, columns, gain)
            if attention_biases if name.startswith("attn") else mlp_biases:
                toy.tensor(f"blk.{layer}.{name}.bias", toy.generator.normal(scale=0.5, size=rows))
        for name in ("attn_norm", "ffn_norm"):
            toy.norm(f"blk.{layer}.{name}.weight", d)
    return toy.write()


def toy_gemma3(
    path: Path,
    *,
    block_type: str = "F32",
    separate_output: bool = False,
    linear_factor: float = 1.0,
    kv_heads: int = 2,
    head_width: int | None = None,
    softcap: float = 0.0,
    layers: int = 7,
    window: int = 8,
    pattern: int | None = None,
    local_rope_base: float | None = None,
    seed: int = 0,
) -> Path:
    """Writes a gemma3 whose every sixth layer sees everything and the others `window` tokens.

    Its norm weights hold the 1 that the architecture adds, and its rope is on halves, as converted files have it.

    Args:
      path: the file.
      block_type: of all matrices.
      separate_output: an output matrix of its own, else the embedding is used twice.
      linear_factor: of the global layers' rope scaling; 1 for none.
      kv_heads: 1, 2 or 4.
      head_width: other than the model's width divided by the heads.
      softcap: of the logits; 0 for none.
      layers: how many; with 62 it is the 27B model, whose attention is scaled otherwise.
      window: of the local layers.
      pattern: every how manyth layer sees everything, written to the file; None for the default, 6.
      local_rope_base: of the local layers, written to the file; None for the default, 10000.
      seed: of the weights.
    """
    wide = wide_blocks(block_type)
    d, f, heads = (256, 512, 4) if wide else (64, 128, 4)
    width = head_width or d // heads
    toy = Toy(path, "gemma3", spm_metadata(), GGMLType[block_type], seed)
    toy.sizes(layers, d, f, heads, kv_heads, context=512)
    toy.value("rope.freq_base", 1_000_000.0)
    toy.value("attention.sliding_window", window)
    if pattern is not None:
        toy.value("attention.sliding_window_pattern", pattern)
    if local_rope_base is not None:
        toy.value("rope.freq_base_swa", local_rope_base)
    toy.value("attention.key_length", width)
    toy.value("attention.value_length", width)
    if linear_factor != 1:
        toy.value("rope.scaling.type", "linear")
        toy.value("rope.scaling.factor", linear_factor)
    if softcap:
        toy.value("final_logit_softcapping", softcap)
    toy.outside(d, separate_output)
    q, kv = heads * width, kv_heads * width
    for layer in range(layers):
        for name, rows, columns in (
            ("attn_q", q, d),
            ("attn_k", kv, d),
            ("attn_v", kv, d),
            ("attn_output", d, q),
            ("ffn_gate", f, d),
            ("ffn_up", f, d),
            ("ffn_down", d, f),
        ):
            toy.matrix(f"blk.{layer}.{name}.weight", rows, columns)
        for name in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"):
            toy.norm(f"blk.{layer}.{name}.weight", d)
        for name in ("attn_q_norm", "attn_k_norm"):
            toy.norm(f"blk.{layer}.{name}.weight", width)
    return toy.write()


# Of each architecture: metadata of its own, and which norms and fused matrices its layers have.
DECODERS: dict[str, dict[str, Any]] = {
    "qwen2": {"biases": ("attn_q", "attn_k", "attn_v")},
    "qwen3": {"width": 24, "qk_norm": "head"},
    "olmo2": {"qk_norm": "whole", "norms": ("post_attention_norm", "post_ffw_norm")},
    "granite": {
        "values": {"logit_scale": 4.0, "residual_scale": 0.3, "embedding_scale": 6.0, "attention.scale": 0.2},
    },
    "smollm3": {},
    "phi3": {"fused": True, "values": {"attention.sliding_window": 9}},
    "gemma2": {
        "norms": ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"),
        "values": {
            "attention.sliding_window": 8,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 5.0,
        },
        "width": 24,
    },
    "glm4": {
        "norms": ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"),
        "fused_gate": True,
        "values": {"rope.dimension_count": 8},
        "biases": ("attn_q", "attn_k", "attn_v"),
    },
    "mistral3": {
        "values": {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 64,
            "rope.scaling.yarn_beta_fast": 8.0,
            "rope.scaling.yarn_beta_slow": 2.0,
            "rope.scaling.yarn_log_multiplier": 1.0,
            "attention.temperature_scale": 0.5,
        },
    },
    "falcon": {"layer_norm": True, "fused_qkv": True, "gated": False, "kv_heads": 1, "norms": ("attn_norm",)},
    "falcon-40b": {
        "architecture": "falcon",
        "layer_norm": True,
        "fused_qkv": True,
        "gated": False,
        "norms": ("attn_norm", "attn_norm_2"),
    },
    "command-r": {
        "layer_norm": True,
        "norm_biases": False,
        "qk_norm": "each head",
        "norms": ("attn_norm",),
        "values": {"logit_scale": 0.3},
    },
    "cohere2": {
        "layer_norm": True,
        "norm_biases": False,
        "norms": ("attn_norm",),
        "values": {"logit_scale": 0.3, "attention.sliding_window": 8},
    },
    "starcoder2": {"layer_norm": True, "gated": False, "biases": "all"},
    "stablelm": {
        "layer_norm": True,
        "biases": ("attn_q", "attn_k", "attn_v"),
        "values": {"rope.dimension_count": 4},
    },
    "stablelm-12b": {
        "architecture": "stablelm",
        "layer_norm": True,
        "norms": ("attn_norm",),
        "qk_norm": "each head",
        "values": {"rope.dimension_count": 4},
    },
    "phi2": {
        "layer_norm": True,
        "gated": False,
        "biases": "all",
        "output_bias": True,
        "norms": ("attn_norm",),
        "values": {"rope.dimension_count": 6},
    },
    "gptneox": {
        "layer_norm": True,
        "fused_qkv": True,
        "gated": False,
        "kv_heads": 4,
        "biases": "all",
        "values": {"rope.dimension_count": 4, "use_parallel_residual": True},
    },
    "nemotron": {"layer_norm": True, "gated": False, "values": {"rope.dimension_count": 8}},
    "arcee": {"gated": False},
    "internlm2": {},
    "ernie4_5": {},
    "exaone": {},
    "exaone4": {
        "qk_norm": "head",
        "norms": ("post_attention_norm", "post_ffw_norm"),
        "values": {
            "attention.sliding_window": 8,
            "attention.sliding_window_pattern": [True, True, True, False],
        },
    },
    "olmo3": {
        "architecture": "olmo2",
        "qk_norm": "whole",
        "norms": ("post_attention_norm", "post_ffw_norm"),
        "values": {
            "attention.sliding_window": 8,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 64,
        },
    },
    "gemma": {"width": 24},
    "baichuan": {},
    "gpt2": {
        "layer_norm": True,
        "fused_qkv": True,
        "gated": False,
        "kv_heads": 4,
        "biases": "all",
        "positions": True,
    },
    "starcoder": {
        "layer_norm": True,
        "fused_qkv": True,
        "gated": False,
        "kv_heads": 1,
        "biases": "all",
        "positions": True,
    },
    "bloom": {
        "layer_norm": True,
        "fused_qkv": True,
        "gated": False,
        "kv_heads": 4,
        "biases": "all",
        "embedding_norm": True,
        "widened": 4,
    },
    "mpt": {
        "layer_norm": True,
        "norm_biases": False,
        "fused_qkv": True,
        "gated": False,
        "kv_heads": 4,
        "widened": 4,
        "values": {"attention.clamp_kqv": 0.8, "attention.max_alibi_bias": 8.0},
    },
    "xverse": {},
    "orion": {"layer_norm": True},
    "plamo": {"norms": ("attn_norm",)},
    "refact": {"kv_heads": 1},
    "jais": {
        "layer_norm": True,
        "fused_qkv": True,
        "kv_heads": 4,
        "biases": "all",
        "values": {"attention.max_alibi_bias": 8.0},
    },
    "jais2": {"layer_norm": True, "gated": False, "biases": "all"},
    "pangu-embedded": {"biases": ("attn_q", "attn_k", "attn_v", "attn_output")},
    "qwen2vl": {
        "biases": ("attn_q", "attn_k", "attn_v"),
        "values": {"rope.dimension_sections": [2, 3, 3, 0]},
    },
    "qwen3vl": {"width": 24, "qk_norm": "head", "values": {"rope.dimension_sections": [4, 4, 4, 0]}},
    # Of each layer: heads, KV heads and the width of the feed-forward part; the third has a matrix for attention.
    "deci": {"forms": [(4, 2, 128), (4, 4, 64), (4, 0, 96), (0, 0, 64), (4, 1, 0)]},
    "openelm": {
        "forms": [(4, 1, 64), (4, 2, 96), (6, 3, 128), (8, 4, 160)],
        "fused_qkv": True,
        "qk_norm": "head",
    },
    "minicpm": {"values": {"logit_scale": 4.0, "residual_scale": 0.3, "embedding_scale": 6.0}},
    "qwen": {
        "fused_qkv": True,
        "biases": ("attn_qkv",),
        "kv_heads": 4,
        "doubled": True,
    },
    "codeshell": {"layer_norm": True, "fused_qkv": True, "gated": False, "biases": "all"},
    "chatglm": {
        "fused_gate": True,
        "biases": ("attn_q", "attn_k", "attn_v"),
        "values": {"rope.dimension_count": 8},
    },
    "olmo": {
        "layer_norm": True,
        "norm_biases": False,
        "norms": (),
        "values": {"attention.clamp_kqv": 0.8, "attention.layer_norm_epsilon": 1e-5},
    },
    "hunyuan-dense": {"qk_norm": "head", "width": 24},
    "apertus": {
        "gated": False,
        "qk_norm": "head",
        "width": 24,
        "keys": {
            "xielu.alpha_n": [0.3, -1.5, 2.0, -0.2],
            "xielu.alpha_p": [-0.5, 1.0, 0.1, -2.0],
            "xielu.beta": [0.5, 0.4, 0.6, 0.5],
            "xielu.eps": [-1e-6, -1e-6, -0.5, -1e-6],
        },
    },
    "seed_oss": {
        "norms": ("attn_norm", "post_attention_norm"),
        "biases": ("attn_q", "attn_k", "attn_v"),
        "width": 24,
    },
}


def toy_decoder(
    path: Path,
    architecture: str,
    *,
    block_type: str = "F32",
    separate_output: bool = False,
    yarn_factor: float = 0.0,
    longrope: bool = False,
    layers: int = 4,
    seed: int = 0,
) -> Path:
    """Writes a model of one of `DECODERS`, with every option that the architecture has turned on.

    Args:
      path: the file.
      architecture: its name.
      block_type: of all matrices.
      separate_output: an output matrix of its own, else the embedding is used twice.
      yarn_factor: of rope scaling from a context of 64; 0 for none.
      longrope: divisors of the rope for contexts up to 64 and for longer ones.
      layers: how many.
      seed: of the weights.
    """
    options = DECODERS[architecture]
    wide = wide_blocks(block_type)
    d, f, heads, kv_heads = (256, 512, 4, 2) if wide else (64, 128, 4, 2)
    kv_heads = options.get("kv_heads", kv_heads)
    f = d * options.get("widened", 2)
    width = options.get("width", d // heads)
    architecture = options.get("architecture", architecture)
    wider = d // 64
    forms = [(own, kv, wider * width) for own, kv, width in options.get("forms", ())]
    forms = forms or [(heads, kv_heads, f)] * layers
    toy = Toy(path, architecture, pairs_metadata("default", ["abcdefghijklmno "]), GGMLType[block_type], seed)
    stated = 2 * f if options.get("doubled") else f
    own_sizes: tuple[Any, Any, Any] = (stated, heads, kv_heads)
    if "forms" in options:
        own_sizes = tuple([form[n] for form in forms] for n in (2, 0, 1))
    toy.sizes(len(forms), d, *own_sizes, context=512)
    toy.value("rope.freq_base", 10_000.0)
    toy.value("attention.key_length", width)
    toy.value("attention.value_length", width)
    own = {"attention.layer_norm_epsilon": 1e-3} if options.get("layer_norm", False) else {}
    for key, value in (own | options.get("values", {})).items():
        toy.value(key, value)
    for key, value in options.get("keys", {}).items():
        toy.key(key, value)
    if yarn_factor:
        toy.value("rope.scaling.type", "yarn")
        toy.value("rope.scaling.factor", yarn_factor)
        toy.value("rope.scaling.original_context_length", 64)
    if longrope:
        toy.longrope(width)
    norm_biases = options.get("norm_biases", options.get("layer_norm", False))
    toy.outside(d, separate_output, normed=options.get("norms", True) != ())
    if norm_biases:
        toy.bias("output_norm.bias", d)
    if options.get("positions", False):
        toy.tensor("position_embd.weight", toy.generator.normal(size=(512, d)))
    if options.get("embedding_norm", False):
        toy.norm("token_embd_norm.weight", d)
        toy.bias("token_embd_norm.bias", d)
    if options.get("output_bias", False):
        toy.bias("output.bias", toy.vocabulary_size)
    fused = options.get("fused", options.get("fused_qkv", False))
    fused_gate = options.get("fused", options.get("fused_gate", False))
    biases = options.get("biases", ())
    for layer, (own, kv_heads, f) in enumerate(forms):
        q, kv = own * width, kv_heads * width
        matrices = (
            {"attn_qkv": (q + 2 * kv, d)}
            if fused
            else {"attn_q": (q, d), "attn_k": (kv, d), "attn_v": (kv, d)}
        )
        matrices = (matrices if kv else {}) | ({"attn_output": (d, q)} if own else {})
        if f:
            matrices |= {"ffn_up": (2 * f, d) if fused_gate else (f, d), "ffn_down": (d, f)}
            if not fused_gate and options.get("gated", True):
                matrices["ffn_gate"] = (f, d)
        for name, (rows, columns) in matrices.items():
            toy.matrix(
                f"blk.{layer}.{name}.weight", rows, columns, 1.5 if name in ("attn_q", "attn_k") else 1.0
            )
            if biases == "all" or name in biases:
                toy.bias(f"blk.{layer}.{name}.bias", rows)
        norms = options.get("norms", (*(["attn_norm"] if own else []), *(["ffn_norm"] if f else [])))
        for name in norms:
            toy.norm(f"blk.{layer}.{name}.weight", d)
            if norm_biases:
                toy.bias(f"blk.{layer}.{name}.bias", d)
        if options.get("qk_norm") == "each head":
            toy.norm(f"blk.{layer}.attn_q_norm.weight", (heads, width))
            toy.norm(f"blk.{layer}.attn_k_norm.weight", (kv_heads, width))
        elif "qk_norm" in options:
            whole = options["qk_norm"] == "whole"
            toy.norm(f"blk.{layer}.attn_q_norm.weight", q if whole else width)
            toy.norm(f"blk.{layer}.attn_k_norm.weight", kv if whole else width)
    return toy.write()


def wide_blocks(block_type: str) -> bool:
    """Whether a block holds 128 or 256 weights, so that rows must be as wide."""
    return gguf.GGML_QUANT_SIZES[GGMLType[block_type]][0] >= 128


class Toy:
    """A GGUF file in the making."""

    def __init__(
        self, path: Path, architecture: str, vocabulary: Mapping[str, Any], block_type: GGMLType, seed: int
    ) -> None:
        self.path = Path(path)
        self.generator = np.random.default_rng(seed)
        self._architecture = architecture
        self._type = block_type
        self._writer = gguf.GGUFWriter(self.path, architecture)
        self.vocabulary_size = len(vocabulary["tokenizer.ggml.tokens"])
        for key, value in vocabulary.items():
            if key != "general.architecture":
                self._add(key, value)

    def sizes(
        self, layers: int, d: int, f: Any, heads: Any, kv_heads: Any, context: int, eps: float = 1e-5
    ) -> None:
        """The metadata that every architecture has; width and heads may be lists with a number for each layer."""
        self.value("block_count", layers)
        self.value("context_length", context)
        self.value("embedding_length", d)
        self.value("feed_forward_length", f)
        self.value("attention.head_count", heads)
        self.value("attention.head_count_kv", kv_heads)
        self.value("attention.layer_norm_rms_epsilon", eps)

    def value(self, key: str, value: Any) -> None:
        """A metadata value of the architecture."""
        self._add(f"{self._architecture}.{key}", value)

    def key(self, key: str, value: Any) -> None:
        """A metadata value."""
        self._add(key, value)

    def outside(self, d: int, separate_output: bool, normed: bool = True) -> None:
        """The tensors outside the layers."""
        self.matrix("token_embd.weight", self.vocabulary_size, d, 2.0)
        if normed:
            self.norm("output_norm.weight", d)
        if separate_output:
            self.matrix("output.weight", self.vocabulary_size, d, 2.0)

    def longrope(self, width: int) -> None:
        """Divisors of the rope for contexts up to 64 and for longer ones."""
        self.value("rope.scaling.original_context_length", 64)
        self.value("rope.scaling.attn_factor", math.sqrt(1 + math.log(512 / 64) / math.log(64)))
        self.tensor("rope_factors_short.weight", np.linspace(1, 1.5, width // 2))
        self.tensor("rope_factors_long.weight", np.linspace(1, 8, width // 2))

    def norm(self, name: str, shape: int | tuple[int, ...]) -> None:
        """A norm weight around 1."""
        self.tensor(name, self.generator.uniform(0.5, 1.5, shape))

    def bias(self, name: str, width: int) -> None:
        """A bias."""
        self.tensor(name, self.generator.normal(scale=0.5, size=width))

    def tensor(self, name: str, values: np.ndarray) -> None:
        """A float32 tensor."""
        self._writer.add_tensor(name, values.astype(np.float32))

    def matrix(self, name: str, rows: int, columns: int, gain: float = 1.0) -> None:
        """Random weights in the file's block type; `gain` is the spread of the products of unit inputs."""
        self._writer.add_tensor(name, self._blocks(rows, columns, gain), raw_dtype=self._type)

    def stack(self, name: str, count: int, rows: int, columns: int, gain: float = 1.0) -> None:
        """The same for `count` matrices in one tensor."""
        data = self._blocks(count * rows, columns, gain).reshape(count, rows, -1)
        self._writer.add_tensor(name, data, raw_dtype=self._type)

    def _blocks(self, rows: int, columns: int, gain: float) -> np.ndarray:
        spread = gain * columns**-0.5
        if self._type.name in _SCALE_AT:
            return self._random_blocks(rows, columns, spread)
        if self._type.name == "NVFP4" or self._type.name.startswith("IQ"):
            return self._random_codes(rows, columns, spread)
        values = self.generator.normal(scale=spread, size=(rows, columns)).astype(np.float32)
        return gguf.quants.quantize(values, self._type)

    def write(self) -> Path:
        """Writes the file."""
        self._writer.write_header_to_file()
        self._writer.write_kv_data_to_file()
        self._writer.write_tensors_to_file()
        self._writer.close()
        return self.path

    def _random_codes(self, rows: int, columns: int, spread: float) -> np.ndarray:
        """The same for formats whose only scale `random_rows` knows how to place."""
        seed = int(self.generator.integers(1 << 32))

        def drawn(units: np.ndarray) -> np.ndarray:
            data = random_rows(self._type, rows, columns, seed, units.astype(np.float16).view(np.uint16))
            if (
                self._type.name == "NVFP4"
            ):  # a byte a sub-block: five bits of exponent and sign, three of mantissa
                scales = self.generator.choice(gguf.quants.NVFP4.fp32_to_ue4m3(units), (data.size // 36, 4))
                data.reshape(-1, 36)[:, :4] = scales
            return data

        one = float(gguf.quants.dequantize(drawn(np.ones(1)), self._type).std())
        return drawn(self.generator.uniform(0.7, 1.3, 64) * (spread / one))

    def _random_blocks(self, rows: int, columns: int, spread: float) -> np.ndarray:
        """The gguf package can't quantize to these formats: random bits, with scales set for the spread."""
        _, block_bytes = gguf.GGML_QUANT_SIZES[self._type]
        at, minimum = _SCALE_AT[self._type.name], _MINIMUM.get(self._type.name)
        seed = int(self.generator.integers(1 << 32))
        data = random_rows(self._type, rows, columns, seed).reshape(-1, block_bytes)
        chance = self.generator.uniform(0.7, 1.3, (len(data), 1))

        def set_scales(unit: float) -> None:
            scales = chance * unit
            if minimum is not None:
                scales = np.concatenate([scales, scales * minimum], axis=1)
            data[:, at : at + 2 * scales.shape[1]] = scales.astype(np.float16).view(np.uint8)

        set_scales(1.0)
        set_scales(spread / float(gguf.quants.dequantize(data, self._type).std()))
        return data.reshape(rows, -1)

    def _add(self, key: str, value: Any) -> None:
        writer = self._writer
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value.tolist() if isinstance(value, np.ndarray) else value)
