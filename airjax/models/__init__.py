"""Architectures: one file each, found by the name that a GGUF file gives.

To add one: write a file with an `ARCHITECTURE`, and import and name it here. A `Decoder` and a function that reads its
configuration do for most; another kind of block brings the functions of `Architecture`.
"""

from __future__ import annotations

import dataclasses

from airjax.gguf import GGUF, GGUFError
from airjax.models import (
    afmoe,
    apertus,
    arcee,
    arctic,
    baichuan,
    bailingmoe,
    bailingmoe2,
    bloom,
    chatglm,
    codeshell,
    cohere2,
    command_r,
    dbrx,
    deci,
    deepseek,
    deepseek2,
    dots1,
    ernie4_5,
    ernie4_5_moe,
    exaone,
    exaone4,
    exaone_moe,
    falcon,
    gemma,
    gemma2,
    gemma3,
    gemma3n,
    gemma4,
    glm4,
    glm4moe,
    gpt2,
    gpt_oss,
    gptneox,
    granite,
    granitemoe,
    grok,
    hunyuan_dense,
    hunyuan_moe,
    internlm2,
    jais,
    jais2,
    llama,
    llama4,
    mimo2,
    minicpm,
    minimax_m2,
    mistral3,
    mistral4,
    mpt,
    nemotron,
    olmo,
    olmo2,
    olmoe,
    openelm,
    orion,
    pangu_embedded,
    phi2,
    phi3,
    phimoe,
    plamo,
    qwen,
    qwen2,
    qwen2moe,
    qwen2vl,
    qwen3,
    qwen3moe,
    qwen3vl,
    qwen3vlmoe,
    refact,
    seed_oss,
    smallthinker,
    smollm3,
    stablelm,
    starcoder,
    starcoder2,
    xverse,
)
from airjax.models.architecture import AXIS as AXIS
from airjax.models.architecture import Architecture as Architecture
from airjax.models.architecture import Buffers as Buffers
from airjax.models.architecture import Config as Config
from airjax.models.architecture import TensorSpec as TensorSpec
from airjax.models.architecture import Weights as Weights
from airjax.models.architecture import check_tensors as check_tensors
from airjax.models.architecture import unpack as unpack
from airjax.models.attending import attend as attend
from airjax.models.decoder import ROPE_DIVISORS as ROPE_DIVISORS
from airjax.models.decoder import DecoderConfig as DecoderConfig
from airjax.models.decoder import for_context
from airjax.models.experts import EXPERT_STACKS as EXPERT_STACKS
from airjax.models.experts import GATHERED_BYTES as GATHERED_BYTES
from airjax.models.experts import Chosen as Chosen
from airjax.models.experts import arriving_products as arriving_products
from airjax.models.experts import biases as biases
from airjax.models.experts import block_rows as block_rows
from airjax.models.experts import by_matrix as by_matrix
from airjax.models.experts import chosen_products as chosen_products
from airjax.models.experts import combined as combined
from airjax.models.experts import decoded_experts as decoded_experts
from airjax.models.experts import expert_products as expert_products
from airjax.models.experts import read_by_router as read_by_router
from airjax.models.experts import takes_kernels as takes_kernels
from airjax.models.experts import with_kernels as with_kernels
from airjax.models.passing import held_at_once as held_at_once
from airjax.models.passing import passing_order as passing_order
from airjax.models.sharding import BY_HEADS as BY_HEADS
from airjax.models.sharding import BY_HEADS_LAST as BY_HEADS_LAST
from airjax.models.sharding import BYTES as BYTES
from airjax.models.sharding import VOCABULARY_CUT as VOCABULARY_CUT
from airjax.models.sharding import WHOLE as WHOLE
from airjax.models.sharding import Cut as Cut
from airjax.models.sharding import check_cuts as check_cuts
from airjax.models.sharding import cut_of as cut_of
from airjax.models.sharding import local_config as local_config
from airjax.models.sharding import spread as spread

_MODULES = (
    afmoe,
    apertus,
    arcee,
    arctic,
    baichuan,
    bailingmoe,
    bailingmoe2,
    bloom,
    chatglm,
    codeshell,
    cohere2,
    command_r,
    dbrx,
    deci,
    deepseek,
    deepseek2,
    dots1,
    ernie4_5,
    ernie4_5_moe,
    exaone,
    exaone4,
    exaone_moe,
    falcon,
    gemma,
    gemma2,
    gemma3,
    gemma3n,
    gemma4,
    glm4,
    glm4moe,
    gpt2,
    gpt_oss,
    gptneox,
    granite,
    granitemoe,
    grok,
    hunyuan_dense,
    hunyuan_moe,
    internlm2,
    jais,
    jais2,
    llama,
    llama4,
    mimo2,
    minicpm,
    minimax_m2,
    mistral3,
    mistral4,
    mpt,
    nemotron,
    olmo,
    olmo2,
    olmoe,
    openelm,
    orion,
    pangu_embedded,
    phi2,
    phi3,
    phimoe,
    plamo,
    qwen,
    qwen2,
    qwen2moe,
    qwen2vl,
    qwen3,
    qwen3moe,
    qwen3vl,
    qwen3vlmoe,
    refact,
    seed_oss,
    smallthinker,
    smollm3,
    stablelm,
    starcoder,
    starcoder2,
    xverse,
)
# The names that files give where they have a hyphen.
_HYPHENATED = {
    "command_r": "command-r",
    "ernie4_5_moe": "ernie4_5-moe",
    "exaone_moe": "exaone-moe",
    "gpt_oss": "gpt-oss",
    "hunyuan_dense": "hunyuan-dense",
    "hunyuan_moe": "hunyuan-moe",
    "minimax_m2": "minimax-m2",
    "pangu_embedded": "pangu-embedded",
}
_ARCHITECTURES: dict[str, Architecture] = {
    _HYPHENATED.get(name, name): module.ARCHITECTURE
    for name, module in ((module.__name__.rpartition(".")[2], module) for module in _MODULES)
}
# Why others of those that gguf names can't be run.
_REASONS = {
    "has state-space, linear-attention or convolution layers": (
        *(
            "arwkv7",
            "falcon-h1",
            "granitehybrid",
            "jamba",
            "kimi-linear",
            "lfm2",
            "lfm2moe",
            "mamba",
            "mamba2",
        ),
        *(
            "nemotron_h",
            "nemotron_h_moe",
            "plamo2",
            "qwen35",
            "qwen35moe",
            "qwen3next",
            "rwkv6",
            "rwkv6qwen2",
        ),
        "rwkv7",
    ),
    "reads images": ("chameleon", "cogvlm", "deepseek2-ocr", "hunyuan_vl", "paddleocr"),
    "has attention that picks positions by an index": ("glm-dsa",),
    "has norms inside attention and feed-forward parts": ("bitnet",),
    "has experts of two kinds": ("grovemoe",),
    "has layers that differ in their heads and gates": ("step35",),
    "has latent attention of a form of its own": ("minicpm3", "plm"),
    "has a form that is not established": ("gptj", "maincoder", "plamo3"),
    "is no decoder-only language model": (
        *("bert", "clip", "eurobert", "gemma-embedding", "jina-bert-v2", "jina-bert-v3", "llama-embed"),
        *("modern-bert", "neo-bert", "nomic-bert", "nomic-bert-moe", "t5", "t5encoder", "wavtokenizer-dec"),
    ),
    "writes its text by diffusion": ("dream", "llada", "llada-moe", "rnd1"),
}


def get(architecture: str) -> Architecture:
    """The functions of an architecture that `from_gguf` accepted."""
    return _ARCHITECTURES[architecture]


def from_gguf(
    gguf: GGUF, compute_dtype: str, kv_dtype: str = "auto", context: int | None = None
) -> tuple[Architecture, Config]:
    """Finds the architecture of a file, reads its configuration and checks its tensor table.

    Args:
      gguf: the open file.
      compute_dtype: "float32", "bfloat16" or "float16".
      kv_dtype: one of `layers.KV_DTYPES`, or "auto" for the compute dtype.
      context: positions of the KV cache, where the rope depends on it; None for few.

    Raises:
      GGUFError: the architecture is unknown, or the file does not fit it. No tensor data is read.
    """
    name = gguf.get("general.architecture", str)
    if name not in _ARCHITECTURES:
        reason = next((f" {reason} and" for reason, names in _REASONS.items() if name in names), "")
        raise GGUFError(
            f"{gguf.path}: architecture {name!r}{reason} can't be run: airjax runs {', '.join(sorted(_ARCHITECTURES))}"
        )
    architecture = get(name)
    config = architecture.config_from_gguf(gguf, compute_dtype)
    if kv_dtype != "auto":
        config = dataclasses.replace(config, kv_dtype=kv_dtype)
    check_tensors(gguf, architecture, config)
    return architecture, for_context(config, context or 0)
