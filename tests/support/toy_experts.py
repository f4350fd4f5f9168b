"""Tiny mixtures of experts with random weights as GGUF files, the same bytes for the same options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as GGMLType
from toy_models import Toy, wide_blocks
from toy_vocabularies import pairs_metadata

STACKS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
# Of each model: its architecture, metadata of its own, and what its layers have.
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"architecture": "llama", "count": 6, "used": 2},
    "qwen2moe": {
        "count": 8,
        "used": 3,
        "shared": 96,
        "biases": ("attn_q", "attn_k", "attn_v"),
    },
    "qwen3moe": {"count": 8, "used": 3, "qk_norm": True},
    "glm4moe": {
        "count": 8,
        "used": 3,
        "qk_norm": True,
        "biases": ("attn_q", "attn_k", "attn_v"),
        "norms": ("attn_norm", "post_attention_norm"),
        "shared": 32,
        "shared_gate": False,
        "dense": (0,),
        "choice_bias": True,
        "guessing": 1,
        "values": {
            "leading_dense_block_count": 1,
            "expert_shared_count": 1,
            "expert_gating_func": 2,
            "expert_weights_norm": True,
            "expert_weights_scale": 1.5,
            "rope.dimension_count": 8,
            "nextn_predict_layers": 1,
        },
    },
    "gpt-oss": {
        "count": 8,
        "used": 3,
        "biases": ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate_inp", *STACKS),
        "sinks": True,
        "norms": ("attn_norm", "post_attention_norm"),
        "values": {
            "attention.sliding_window": 9,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 64,
        },
    },
    # As DeepSeek-V3: a cache of one key head, which the metadata give the widths of.
    "deepseek2": {
        "count": 8,
        "used": 3,
        "latent": {"q_rank": 96, "split": True},
        "shared": 64,
        "shared_gate": False,
        "dense": (0,),
        "choice_bias": True,
        "values": {
            "leading_dense_block_count": 1,
            "expert_shared_count": 2,
            "expert_gating_func": 2,
            "expert_weights_norm": True,
            "expert_weights_scale": 2.5,
            "expert_group_count": 4,
            "expert_group_used_count": 2,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 64,
            "rope.scaling.yarn_log_multiplier": 0.1,
        },
    },
    # As files of DeepSeek-V2 that were converted early: one matrix of keys and values, and queries without a rank.
    "deepseek2-lite": {
        "architecture": "deepseek2",
        "count": 8,
        "used": 3,
        "latent": {"q_rank": 0, "split": False},
        "shared": 64,
        "shared_gate": False,
        "dense": (0,),
        "values": {"leading_dense_block_count": 1, "expert_shared_count": 2, "expert_weights_scale": 1.5},
    },
}
MIXTURES |= {
    "granitemoe": {
        "count": 8,
        "used": 3,
        "shared": 32,
        "shared_gate": False,
        "values": {
            "expert_shared_feed_forward_length": 32,
            "logit_scale": 4.0,
            "residual_scale": 0.3,
            "embedding_scale": 6.0,
            "attention.scale": 0.2,
        },
    },
    "olmoe": {"count": 8, "used": 3, "qk_norm": "whole"},
    "ernie4_5-moe": {
        "count": 8,
        "used": 3,
        "shared": 64,
        "shared_gate": False,
        "dense": (0, 2),
        "choice_bias": True,
        "values": {
            "expert_shared_count": 2,
            "expert_shared_feed_forward_length": 64,
            "leading_dense_block_count": 1,
            "interleave_moe_layer_step": 2,
        },
    },
    "dots1": {
        "count": 8,
        "used": 3,
        "qk_norm": True,
        "shared": 64,
        "shared_gate": False,
        "dense": (0,),
        "choice_bias": True,
        "values": {
            "leading_dense_block_count": 1,
            "expert_shared_count": 2,
            "expert_gating_func": 2,
            "expert_weights_norm": True,
            "expert_weights_scale": 2.5,
        },
    },
    "exaone-moe": {
        "count": 8,
        "used": 3,
        "qk_norm": True,
        "shared": 32,
        "shared_gate": False,
        "dense": (0,),
        "choice_bias": True,
        "values": {
            "leading_dense_block_count": 1,
            "expert_shared_count": 1,
            "expert_gating_func": 2,
            "expert_weights_norm": True,
            "expert_weights_scale": 2.5,
            "attention.sliding_window": 8,
            "attention.sliding_window_pattern": [True, True, True],
        },
    },
    "hunyuan-moe": {
        "count": 8,
        "used": 3,
        "qk_norm": True,
        "shared": 32,
        "shared_gate": False,
        "values": {"expert_shared_count": 1},
    },
    "minimax-m2": {
        "count": 8,
        "used": 3,
        "qk_norm": "whole",
        "choice_bias": True,
        "values": {"rope.dimension_count": 8, "expert_gating_func": 2},
    },
    "dbrx": {
        "count": 8,
        "used": 3,
        "fused_qkv": True,
        "norms": ("attn_norm", "attn_output_norm"),
        "values": {"attention.layer_norm_epsilon": 1e-3, "attention.clamp_kqv": 0.8},
    },
    "phimoe": {
        "count": 8,
        "used": 2,
        "biases": ("attn_q", "attn_k", "attn_v", "attn_output"),
        "norm_biases": True,
        "output_bias": True,
        "longrope": True,
        "values": {"attention.sliding_window": 40},
    },
    "qwen3vlmoe": {
        "count": 8,
        "used": 3,
        "qk_norm": True,
        "values": {"rope.dimension_sections": [3, 3, 2, 0]},
    },
    "mistral4": {
        "count": 8,
        "used": 3,
        "latent": {"q_rank": 96, "split": True},
        "shared": 32,
        "shared_gate": False,
        "fused_experts": True,
        "values": {
            "expert_shared_count": 1,
            "expert_weights_norm": True,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 64,
            "rope.scaling.yarn_log_multiplier": 0.1,
            "attention.temperature_scale": 0.5,
        },
    },
    "afmoe": {
        "count": 8,
        "used": 3,
        "qk_norm": True,
        "norms": ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"),
        "gated_attention": True,
        "shared": 32,
        "shared_gate": False,
        "dense": (0,),
        "choice_bias": True,
        "layers": 4,
        "values": {
            "leading_dense_block_count": 1,
            "expert_shared_count": 1,
            "expert_gating_func": 2,
            "expert_weights_norm": True,
            "expert_weights_scale": 2.5,
            "attention.sliding_window": 8,
        },
    },
    "smallthinker": {
        "count": 8,
        "used": 3,
        "values": {"expert_gating_func": 2, "attention.sliding_window": 8},
    },
    "arctic": {
        "count": 8,
        "used": 2,
        "norms": ("attn_norm", "ffn_norm", "ffn_norm_exps"),
        "beside": True,
    },
    # Layers with a window have more KV heads, and sinks; values are narrower than keys.
    "mimo2": {
        "count": 8,
        "used": 3,
        "dense": (0,),
        "choice_bias": True,
        "local": [False, True, True, False],
        "layers": 4,
        "values": {
            "attention.sliding_window": 8,
            "attention.value_scale": 0.7,
            "rope.dimension_count": 8,
            "rope.freq_base_swa": 500.0,
        },
    },
    "bailingmoe": {
        "count": 8,
        "used": 3,
        "shared": 64,
        "shared_gate": False,
        "values": {"expert_shared_count": 2, "expert_weights_norm": True, "expert_weights_scale": 1.0},
    },
    "bailingmoe2": {
        "count": 8,
        "used": 3,
        "qk_norm": True,
        "fused_qkv": True,
        "shared": 64,
        "shared_gate": False,
        "dense": (0,),
        "choice_bias": True,
        "values": {
            "rope.dimension_count": 8,
            "leading_dense_block_count": 1,
            "expert_shared_feed_forward_length": 32,
            "expert_shared_count": 2,
            "expert_gating_func": 2,
            "expert_weights_norm": True,
            "expert_weights_scale": 2.5,
            "expert_group_count": 4,
            "expert_group_used_count": 2,
        },
    },
    "deepseek": {
        "count": 8,
        "used": 3,
        "shared": 64,
        "shared_gate": False,
        "dense": (0,),
        "values": {"leading_dense_block_count": 1, "expert_shared_count": 2, "expert_weights_scale": 1.0},
    },
    # Two of its four layers are mixtures, one of four has no rope; the windows are 8 positions long.
    "llama4": {
        "count": 8,
        "used": 1,
        "shared": 32,
        "shared_gate": False,
        "dense": (0, 2),
        "layers": 4,
        "values": {
            "interleave_moe_layer_step": 2,
            "attention.sliding_window": 8,
            "attention.temperature_length": 16,
            "attention.temperature_scale": 0.5,
        },
    },
}
MIXTURES |= {
    "grok-1": {
        "architecture": "grok",
        "count": 8,
        "used": 2,
        "norms": ("attn_norm", "attn_output_norm", "ffn_norm", "layer_output_norm"),
    },
    "grok-2": {
        "architecture": "grok",
        "count": 8,
        "used": 2,
        "norms": ("attn_norm", "attn_output_norm", "ffn_norm", "post_ffw_norm"),
        "beside": "wider",
        # So large that what is normed shows its size.
        "eps": 0.1,
        "values": {
            "embedding_scale": 6.0,
            "logit_scale": 0.4,
            "attention.output_scale": 0.3,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 5.0,
        },
    },
}
# Whose files have the width of an expert under the name of a plain feed-forward part's.
_NAMED_BY_FEED_FORWARD = (
    *("llama", "granitemoe", "olmoe", "hunyuan-moe", "minimax-m2", "dbrx", "arctic"),
    *("phimoe", "grok-1"),
)
# Widths of a toy's latent vector, of a head's key without its rotated part, of that part, and of a value.
_RANK, _KEY, _ROTATED, _VALUE = 32, 24, 8, 32


def _latent_matrices(d: int, heads: int, q_rank: int, split: bool) -> list[dict[str, Any]]:
    """Metadata of latent attention, its matrices, its norms and its stacks by head."""
    suffix = "_mla" if split else ""
    metadata = {
        f"attention.key_length{suffix}": _KEY + _ROTATED,
        f"attention.value_length{suffix}": _VALUE,
        "attention.kv_lora_rank": _RANK,
        "rope.dimension_count": _ROTATED,
    }
    if split:
        metadata |= {"attention.key_length": _RANK + _ROTATED, "attention.value_length": _RANK}
    q = heads * (_KEY + _ROTATED)
    matrices = {"attn_kv_a_mqa": (_RANK + _ROTATED, d), "attn_output": (d, heads * _VALUE)}
    norms, stacks = {"attn_kv_a_norm": _RANK}, {}
    if q_rank:
        metadata["attention.q_lora_rank"] = q_rank
        matrices |= {"attn_q_a": (q_rank, d), "attn_q_b": (q, q_rank)}
        norms["attn_q_a_norm"] = q_rank
    else:
        matrices["attn_q"] = (q, d)
    if split:
        stacks = {"attn_k_b": (heads, _RANK, _KEY), "attn_v_b": (heads, _VALUE, _RANK)}
    else:
        matrices["attn_kv_b"] = (heads * (_KEY + _VALUE), _RANK)
    return [metadata, matrices, norms, stacks]


def toy_mixture(
    path: Path,
    model: str,
    *,
    block_type: str = "F32",
    layers: int | None = None,
    seed: int = 0,
    values: dict[str, Any] | None = None,
    left_out: tuple[str, ...] = (),
    stacked: int | None = None,
    **sizes: int,
) -> Path:
    """Writes one of `MIXTURES`.

    Args:
      path: the file.
      model: its name.
      block_type: of all matrices but the router.
      layers: how many; None for as many as show what the model has.
      seed: of the weights.
      values: metadata of the architecture that replaces its own.
      left_out: tensors of each layer that are not written.
      stacked: experts in the tensors, other than the metadata says.
      **sizes: "count" and "used", other than the model's own.
    """
    options = MIXTURES[model] | sizes
    layers = options.get("layers", 3) if layers is None else layers
    architecture = options.get("architecture", model)
    wide = wide_blocks(block_type)
    d, f, heads, kv_heads = (256, 256, 4, 2) if wide else (64, 32, 4, 2)
    count, used, shared = (
        options["count"],
        options["used"],
        options.get("shared", 0) * (256 // 32 if wide else 1),
    )
    width = d // heads
    toy = Toy(path, architecture, pairs_metadata("default", ["abcdefghijklmno "]), GGMLType[block_type], seed)
    guessing = options.get("guessing", 0)
    latent = options.get("latent")
    if latent:
        own, latent_matrices, latent_norms, latent_stacks = _latent_matrices(d, heads, **latent)
        kv_heads = 1 if latent["split"] else heads
    local = options.get("local", ())[:layers]
    stated = [2 * kv_heads if own else kv_heads for own in local] or kv_heads
    wider = options.get("dense") or options.get("beside") == "wider"
    eps = options.get("eps", 1e-5)
    toy.sizes(layers + guessing, d, 3 * f if wider else f, heads, stated, context=512, eps=eps)
    metadata: dict[str, Any] = {
        "rope.freq_base": 10_000.0,
        "attention.key_length": width,
        "attention.value_length": width,
        "expert_count": count,
        "expert_used_count": used,
    }
    if local:
        metadata |= {"attention.sliding_window_pattern": local, "attention.value_length": width // 2}
    if latent:
        metadata |= own
    if not {model, architecture} & {*_NAMED_BY_FEED_FORWARD}:
        metadata["expert_feed_forward_length"] = f
    if shared and options.get("shared_gate", True):
        metadata["expert_shared_feed_forward_length"] = shared
    for key, value in (metadata | options.get("values", {}) | (values or {})).items():
        toy.value(key, value)
    toy.outside(d, separate_output=True)
    if options.get("norm_biases"):
        toy.bias("output_norm.bias", d)
    if options.get("output_bias"):
        toy.bias("output.bias", toy.vocabulary_size)
    if options.get("longrope"):
        toy.longrope(width)
    q, kv, count = heads * width, kv_heads * width, stacked or count
    attention = [
        ("attn_q", q, d, 1.5),
        ("attn_k", kv, d, 1.5),
        ("attn_v", kv, d, 1.0),
        ("attn_output", d, q, 1.0),
    ]
    if options.get("gated_attention"):
        attention.append(("attn_gate", q, d, 1.5))
    if options.get("fused_qkv"):
        attention = [("attn_qkv", q + 2 * kv, d, 1.5), attention[-1]]
    if latent:
        attention = [(name, *shape, 1.5) for name, shape in latent_matrices.items()]
    for layer in range(layers):
        if local:
            own_kv = kv * (1 + local[layer])
            attention = [("attn_q", q, d, 1.5), ("attn_k", own_kv, d, 1.5)]
            attention += [("attn_v", own_kv // 2, d, 1.0), ("attn_output", d, q // 2, 1.0)]
            if local[layer]:
                toy.tensor(f"blk.{layer}.attn_sinks.weight", toy.generator.normal(scale=2, size=heads))
        if latent:
            for name, width in latent_norms.items():
                toy.norm(f"blk.{layer}.{name}.weight", width)
            for name, (stack, rows, columns) in latent_stacks.items():
                if columns % gguf.GGML_QUANT_SIZES[GGMLType[block_type]][0]:
                    values = toy.generator.normal(scale=columns**-0.5, size=(stack, rows, columns))
                    toy.tensor(f"blk.{layer}.{name}.weight", values)
                else:
                    toy.stack(f"blk.{layer}.{name}.weight", stack, rows, columns, 1.5)
        for name, rows, columns, gain in attention:
            toy.matrix(f"blk.{layer}.{name}.weight", rows, columns, gain)
            if name in options.get("biases", ()):
                toy.tensor(f"blk.{layer}.{name}.bias", toy.generator.normal(scale=0.5, size=rows))
        for name in options.get("norms", ("attn_norm", "ffn_norm")):
            toy.norm(f"blk.{layer}.{name}.weight", d)
            if options.get("norm_biases"):
                toy.bias(f"blk.{layer}.{name}.bias", d)
        if options.get("qk_norm"):
            whole = options["qk_norm"] == "whole"
            toy.norm(f"blk.{layer}.attn_q_norm.weight", q if whole else width)
            toy.norm(f"blk.{layer}.attn_k_norm.weight", kv if whole else width)
        plain = 3 * f if wider else f
        if layer in options.get("dense", ()) or options.get("beside"):
            for name, rows, columns in (("ffn_gate", plain, d), ("ffn_up", plain, d), ("ffn_down", d, plain)):
                toy.matrix(f"blk.{layer}.{name}.weight", rows, columns)
        if layer in options.get("dense", ()):
            continue
        if options.get("choice_bias"):
            toy.tensor(f"blk.{layer}.exp_probs_b.bias", toy.generator.normal(scale=0.3, size=count))
        if "ffn_gate_inp" not in left_out:
            router = toy.generator.normal(scale=2 * d**-0.5, size=(count, d))
            toy.tensor(f"blk.{layer}.ffn_gate_inp.weight", router)
        if "ffn_gate_inp" in options.get("biases", ()):
            toy.tensor(f"blk.{layer}.ffn_gate_inp.bias", toy.generator.normal(size=count))
        if options.get("sinks"):
            toy.tensor(f"blk.{layer}.attn_sinks.weight", toy.generator.normal(scale=2, size=heads))
        fused = [("ffn_gate_up_exps", 2 * f, d)] if options.get("fused_experts") else []
        for name, rows, columns in (
            *(fused or (("ffn_gate_exps", f, d), ("ffn_up_exps", f, d))),
            ("ffn_down_exps", d, f),
        ):
            if name not in left_out:
                toy.stack(f"blk.{layer}.{name}.weight", count, rows, columns, 2.0)
            if name in options.get("biases", ()):
                toy.tensor(f"blk.{layer}.{name}.bias", toy.generator.normal(size=(count, rows)))
        if shared:
            for name, rows, columns in (
                ("ffn_gate_shexp", shared, d),
                ("ffn_up_shexp", shared, d),
                ("ffn_down_shexp", d, shared),
            ):
                toy.matrix(f"blk.{layer}.{name}.weight", rows, columns)
            if options.get("shared_gate", True):
                toy.tensor(
                    f"blk.{layer}.ffn_gate_inp_shexp.weight", toy.generator.normal(scale=d**-0.5, size=d)
                )
    for layer in range(layers, layers + guessing):
        toy.matrix(f"blk.{layer}.nextn.eh_proj.weight", d, 2 * d)
    return toy.write()


def random_ids(vocabulary: int, count: int, seed: int = 0) -> list[int]:
    """Tokens."""
    return np.random.default_rng(seed).integers(0, vocabulary, count).tolist()
