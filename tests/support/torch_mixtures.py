"""More mixtures of experts by transformers, and those that it lacks by a twin in plain torch."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import torch_experts
import torch_plain
import transformers
from torch_models import decoded, model_sizes, neighbours_to_halves, rope_parameters
from transformers.models.phimoe import modeling_phimoe

from airjax.gguf import GGUF, open_gguf

Keys = Callable[..., Any]

_PARTS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
}
_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_KINDS = ("weight", "bias")
_BIAS = "exp_probs_b.bias"


class _Twin(NamedTuple):
    """How transformers names and configures an architecture.

    Attributes:
      kind: of its classes.
      options: of the configuration, from the file's keys.
      parts: names of a layer's parts where they are not `_PARTS`.
      experts: name of the experts.
      bias: name of the bias of the choice.
      permuted: the file holds rows of queries and keys in the order for rope on neighbours.
      across: the experts' matrices stand the other way.
    """

    kind: str
    options: Callable[[Keys], dict[str, Any]]
    parts: Mapping[str, str] = {}
    experts: str = "mlp.experts"
    bias: str = "mlp.gate.e_score_correction_bias"
    permuted: bool = False
    across: bool = False


def _like_deepseek(key: Keys) -> dict[str, Any]:
    return {
        "n_routed_experts": key("expert_count"),
        "n_shared_experts": key("expert_shared_count"),
        "moe_intermediate_size": key("expert_feed_forward_length"),
        "norm_topk_prob": key("expert_weights_norm"),
        "routed_scaling_factor": key("expert_weights_scale"),
        "first_k_dense_replace": key("leading_dense_block_count"),
        "sliding_window": None,
    }


_TWINS: dict[str, _Twin] = {
    "granitemoe": _Twin(
        "GraniteMoeShared",
        lambda key: {
            "num_local_experts": key("expert_count"),
            "shared_intermediate_size": key("expert_shared_feed_forward_length"),
            "logits_scaling": key("logit_scale"),
            "residual_multiplier": key("residual_scale"),
            "embedding_multiplier": key("embedding_scale"),
            "attention_multiplier": key("attention.scale"),
        },
        {"ffn_gate_inp": "block_sparse_moe.router", "ffn_down_shexp": "shared_mlp.output_linear"},
        experts="block_sparse_moe.experts",
        permuted=True,
    ),
    "olmoe": _Twin("Olmoe", lambda key: {"num_experts": key("expert_count"), "norm_topk_prob": False}),
    "ernie4_5-moe": _Twin(
        "Ernie4_5_Moe",
        lambda key: {
            "moe_num_experts": key("expert_count"),
            "moe_k": key("expert_used_count"),
            "moe_intermediate_size": key("expert_feed_forward_length"),
            "moe_num_shared_experts": key("expert_shared_count"),
            "moe_layer_start_index": key("leading_dense_block_count"),
            "moe_layer_interval": key("interleave_moe_layer_step"),
            "use_bias": False,
        },
        bias="mlp.gate.moe_statics.e_score_correction_bias",
    ),
    "qwen3vlmoe": _Twin(
        "Qwen3Moe",
        lambda key: {
            "num_experts": key("expert_count"),
            "moe_intermediate_size": key("expert_feed_forward_length"),
            "norm_topk_prob": True,
        },
    ),
    "afmoe": _Twin(
        "Afmoe",
        lambda key: {
            "num_experts": key("expert_count"),
            "num_shared_experts": key("expert_shared_count"),
            "moe_intermediate_size": key("expert_feed_forward_length"),
            "route_scale": key("expert_weights_scale"),
            "num_dense_layers": key("leading_dense_block_count"),
            "sliding_window": key("attention.sliding_window"),
            "mup_enabled": True,
        },
        {
            "attn_gate": "self_attn.gate_proj",
            "post_attention_norm": "post_attention_layernorm",
            "ffn_norm": "pre_mlp_layernorm",
            "post_ffw_norm": "post_mlp_layernorm",
            "ffn_gate_inp": "mlp.router.gate",
        },
        bias="mlp.expert_bias",
    ),
    "mimo2": _Twin(
        "MiMoV2Flash",
        lambda key: {
            "num_key_value_heads": int(min(key("attention.head_count_kv"))),
            "v_head_dim": key("attention.value_length"),
            "attention_value_scale": key("attention.value_scale"),
            "n_routed_experts": key("expert_count"),
            "moe_intermediate_size": key("expert_feed_forward_length"),
            "norm_topk_prob": True,
            "sliding_window": key("attention.sliding_window"),
            "layer_types": [
                "sliding_attention" if own else "full_attention"
                for own in key("attention.sliding_window_pattern")
            ],
            "rope_parameters": {
                name: {
                    "rope_type": "default",
                    "rope_theta": key(base),
                    "partial_rotary_factor": key("rope.dimension_count") / key("attention.key_length"),
                }
                for name, base in (
                    ("full_attention", "rope.freq_base"),
                    ("sliding_attention", "rope.freq_base_swa"),
                )
            },
        },
    ),
    "dots1": _Twin("Dots1", _like_deepseek),
    "exaone-moe": _Twin(
        "ExaoneMoe",
        lambda key: (
            _like_deepseek(key)
            | {
                "num_experts": key("expert_count"),
                "num_shared_experts": key("expert_shared_count"),
                "sliding_window": key("attention.sliding_window"),
                "layer_types": [
                    "sliding_attention" if local else "full_attention"
                    for local in key("attention.sliding_window_pattern")
                ],
            }
        ),
    ),
    "hunyuan-moe": _Twin(
        "HunYuanMoEV1",
        lambda key: {"num_experts": key("expert_count"), "moe_topk": key("expert_used_count")},
        {
            "ffn_gate_inp": "mlp.gate.wg",
            "attn_q_norm": "self_attn.query_layernorm",
            "attn_k_norm": "self_attn.key_layernorm",
            "ffn_gate_shexp": "mlp.shared_mlp.gate_proj",
            "ffn_up_shexp": "mlp.shared_mlp.up_proj",
            "ffn_down_shexp": "mlp.shared_mlp.down_proj",
        },
    ),
    "minimax-m2": _Twin(
        "MiniMaxM2",
        lambda key: {"num_local_experts": key("expert_count"), "rotary_dim": key("rope.dimension_count")},
        bias="mlp.e_score_correction_bias",
    ),
    "phimoe": _Twin(
        "Phimoe",
        lambda key: {
            "num_local_experts": key("expert_count"),
            "attention_bias": True,
            "lm_head_bias": True,
            "sliding_window": key("attention.sliding_window"),
        },
        {"ffn_gate_inp": "mlp.router"},
    ),
    "llama4": _Twin(
        "Llama4",
        lambda key: {
            "num_local_experts": key("expert_count"),
            "intermediate_size": key("expert_feed_forward_length"),
            "intermediate_size_mlp": key("feed_forward_length"),
            "interleave_moe_layer_step": key("interleave_moe_layer_step"),
            "attention_chunk_size": key("attention.sliding_window"),
            "floor_scale": key("attention.temperature_length"),
            "attn_scale": key("attention.temperature_scale"),
        },
        {
            name: f"feed_forward.{theirs}"
            for name, theirs in {
                "ffn_gate_inp": "router",
                "ffn_gate": "gate_proj",
                "ffn_up": "up_proj",
                "ffn_down": "down_proj",
                "ffn_gate_shexp": "shared_expert.gate_proj",
                "ffn_up_shexp": "shared_expert.up_proj",
                "ffn_down_shexp": "shared_expert.down_proj",
            }.items()
        },
        experts="feed_forward.experts",
        across=True,
    ),
}


def torch_mixture_logits(path: Path, ids: Sequence[int]) -> np.ndarray:
    """Teacher-forced logits of every position, float32 `[T, V]`, of any mixture of experts."""
    with open_gguf(path) as file:
        architecture = file.metadata["general.architecture"]
        if architecture in torch_plain.ARCHITECTURES:
            return torch_plain.torch_logits(path, ids)
        if architecture not in _TWINS:
            return torch_experts.torch_mixture_logits(path, ids)
        twin = _TWINS[architecture]
        model = _model(file, architecture, twin)
        missing, unexpected = model.load_state_dict(_state(file, architecture, twin), strict=False)
        assert not unexpected and not missing, (missing, unexpected)
    if twin.kind == "Phimoe":  # its rope is not told how long the text is
        rope = model.model.rotary_emb
        rope.rope_init_fn = functools.partial(rope.rope_init_fn, seq_len=len(ids))
    # As llama.cpp weighs the experts of its files.
    with torch.inference_mode(), mock.patch.object(modeling_phimoe, "sparsemixer", _softmax_of_chosen):
        return model.eval()(torch.tensor([list(ids)])).logits[0].numpy()


def _softmax_of_chosen(scores: torch.Tensor, top_k: int, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    best = scores.topk(top_k)
    return best.values.softmax(-1), best.indices


def _model(file: GGUF, architecture: str, twin: _Twin) -> Any:
    def key(name: str) -> Any:
        return file.metadata[f"{architecture}.{name}"]

    options = model_sizes(file, architecture) | {
        "num_experts_per_tok": key("expert_used_count"),
        "rope_parameters": rope_parameters(file, architecture, key("rope.freq_base")),
    }
    options |= twin.options(key)
    if twin.kind == "Phimoe":
        scale = key("rope.scaling.attn_factor")
        options["rope_parameters"] |= {"short_mscale": scale, "long_mscale": scale}
    name = f"{twin.kind}Text" if twin.kind == "Llama4" else twin.kind
    config = getattr(transformers, f"{name}Config")(**options)
    return getattr(transformers, f"{twin.kind}ForCausalLM")(config)


def _state(file: GGUF, architecture: str, twin: _Twin) -> dict[str, torch.Tensor]:
    names = {f"{theirs}.{kind}": f"{ours}.{kind}" for ours, theirs in _OUTSIDE.items() for kind in _KINDS}
    state = {theirs: decoded(file, ours) for theirs, ours in names.items() if ours in file.tensors}
    for layer in range(file.metadata[f"{architecture}.block_count"]):
        there = f"model.layers.{layer}"
        for (ours, theirs), kind in itertools.product((_PARTS | dict(twin.parts)).items(), _KINDS):
            name = f"blk.{layer}.{ours}.{kind}"
            if name in file.tensors:
                values = decoded(file, name)
                if twin.permuted and ours in ("attn_q", "attn_k"):
                    heads = "head_count" if ours == "attn_q" else "head_count_kv"
                    heads = file.metadata[f"{architecture}.attention.{heads}"]
                    values = neighbours_to_halves(values, heads)
                state[f"{there}.{theirs}.{kind}"] = values
        if f"blk.{layer}.attn_sinks.weight" in file.tensors:
            state[f"{there}.self_attn.sinks"] = decoded(file, f"blk.{layer}.attn_sinks.weight")
        if f"blk.{layer}.{_BIAS}" in file.tensors:
            bias = decoded(file, f"blk.{layer}.{_BIAS}")
            state[f"{there}.{twin.bias}"] = bias[None] if twin.kind == "Ernie4_5_Moe" else bias
        if twin.kind == "GraniteMoeShared":
            gate, up = (state.pop(f"{there}.{_PARTS[f'ffn_{part}_shexp']}.weight") for part in ("gate", "up"))
            state[f"{there}.shared_mlp.input_linear.weight"] = torch.cat([gate, up])
        if f"blk.{layer}.ffn_gate_exps.weight" in file.tensors:
            gate, up, down = (
                decoded(file, f"blk.{layer}.ffn_{part}_exps.weight") for part in ("gate", "up", "down")
            )
            both = torch.cat([gate, up], dim=1)
            if twin.across:
                both, down = both.swapaxes(1, 2), down.swapaxes(1, 2)
            state[f"{there}.{twin.experts}.gate_up_proj"] = both
            state[f"{there}.{twin.experts}.down_proj"] = down
    return state
