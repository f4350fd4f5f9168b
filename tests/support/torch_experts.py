"""Mixtures of experts by transformers, in float32, with weights that the gguf package decodes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch_models import decoded, model_sizes, neighbours_to_halves, rope_parameters

from airjax.gguf import GGUF, open_gguf

_PROJECTIONS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}


_OF_LATENT_ATTENTION = (
    *("rope_parameters", "num_key_value_heads", "head_dim", "kv_lora_rank", "q_lora_rank"),
    *("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"),
)


def torch_mixture_logits(path: Path, ids: Sequence[int]) -> np.ndarray:
    """Teacher-forced logits of every position, float32 `[T, V]`."""
    with open_gguf(path) as file:
        model = _model(file)
        missing, unexpected = model.load_state_dict(_state(file), strict=False)
        assert not unexpected and not missing, (missing, unexpected)
    with torch.inference_mode():
        return model.eval()(torch.tensor([list(ids)])).logits[0].numpy()


def _model(file: GGUF) -> Any:
    architecture = file.metadata["general.architecture"]

    def key(name: str, default: Any = None) -> Any:
        return file.metadata.get(f"{architecture}.{name}", default)

    options: dict[str, Any] = {
        "num_experts_per_tok": key("expert_used_count"),
        "rope_parameters": rope_parameters(file, architecture, key("rope.freq_base")),
    }
    if architecture == "llama":
        kind = "Mixtral"
        options |= {"num_local_experts": key("expert_count"), "sliding_window": None}
    elif architecture == "gpt-oss":
        kind = "GptOss"
        options |= {
            "num_local_experts": key("expert_count"),
            "sliding_window": key("attention.sliding_window"),
        }
        options["attention_bias"] = True
        options["rope_parameters"]["truncate"] = False
    elif architecture in ("deepseek2", "mistral4"):
        sigmoid = key("expert_gating_func", 1) == 2
        kind = "Mistral4" if architecture == "mistral4" else "DeepseekV3" if sigmoid else "DeepseekV2"
        kind = kind if key("expert_count") else "Youtu"
        suffix = "_mla" if "blk.0.attn_k_b.weight" in file.tensors else ""
        rotated = key("rope.dimension_count")
        options |= {
            "num_key_value_heads": key("attention.head_count"),
            "head_dim": rotated,
            "qk_rope_head_dim": rotated,
            "qk_nope_head_dim": key(f"attention.key_length{suffix}") - rotated,
            "v_head_dim": key(f"attention.value_length{suffix}"),
            "kv_lora_rank": key("attention.kv_lora_rank"),
            "q_lora_rank": key("attention.q_lora_rank"),
            "n_routed_experts": key("expert_count"),
            "n_shared_experts": key("expert_shared_count"),
            "moe_intermediate_size": key("expert_feed_forward_length"),
            "norm_topk_prob": key("expert_weights_norm", False),
            "routed_scaling_factor": key("expert_weights_scale", 1.0),
            "n_group": key("expert_group_count", 1),
            "topk_group": key("expert_group_used_count", 1),
            "first_k_dense_replace": key("leading_dense_block_count", 0),
        }
        if kind == "DeepseekV2":
            options["topk_method"] = "greedy" if options["n_group"] == 1 else "group_limited_greedy"
        if options["rope_parameters"]["rope_type"] == "yarn":
            options["rope_parameters"] |= {"mscale": 1.0, "mscale_all_dim": 1.0}
        if kind == "Mistral4":
            options["rope_parameters"]["llama_4_scaling_beta"] = key("attention.temperature_scale")
    elif architecture == "glm4moe":
        kind = "Glm4Moe"
        width = key("attention.key_length")
        options |= {
            "n_routed_experts": key("expert_count"),
            "n_shared_experts": key("expert_shared_count"),
            "moe_intermediate_size": key("expert_feed_forward_length"),
            "norm_topk_prob": key("expert_weights_norm"),
            "routed_scaling_factor": key("expert_weights_scale"),
            "n_group": key("expert_group_count", 1),
            "topk_group": key("expert_group_used_count", 1),
            "first_k_dense_replace": key("leading_dense_block_count"),
            "use_qk_norm": "blk.0.attn_q_norm.weight" in file.tensors,
            "attention_bias": True,
        }
        options["rope_parameters"]["partial_rotary_factor"] = key("rope.dimension_count", width) / width
    else:
        kind = {"qwen2moe": "Qwen2Moe", "qwen3moe": "Qwen3Moe"}[architecture]
        options |= {
            "num_experts": key("expert_count"),
            "moe_intermediate_size": key("expert_feed_forward_length"),
            "norm_topk_prob": key("expert_weights_norm", architecture == "qwen3moe"),
        }
        if architecture == "qwen2moe":
            options["shared_expert_intermediate_size"] = key("expert_shared_feed_forward_length")
    if kind == "Youtu":  # which has none of what experts need
        options = {name: value for name, value in options.items() if name in _OF_LATENT_ATTENTION}
    sizes = model_sizes(file, architecture)
    sizes["num_hidden_layers"] -= key("nextn_predict_layers", 0)
    if kind == "Mistral4":  # which works it out
        del options["head_dim"], sizes["head_dim"]
    config = getattr(transformers, f"{kind}Config")(**(sizes | options))
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    for name, module in model.named_modules():
        if name.endswith(
            ("q_a_layernorm", "kv_a_layernorm")
        ):  # transformers fixes theirs at what DeepSeek's models have
            module.variance_epsilon = sizes["rms_norm_eps"]
    return model


def _state(file: GGUF) -> dict[str, torch.Tensor]:
    architecture = file.metadata["general.architecture"]
    state = {
        "model.embed_tokens.weight": decoded(file, "token_embd.weight"),
        "model.norm.weight": decoded(file, "output_norm.weight"),
        "lm_head.weight": decoded(file, "output.weight"),
    }
    guessing = file.metadata.get(f"{architecture}.nextn_predict_layers", 0)
    for layer in range(file.metadata[f"{architecture}.block_count"] - guessing):
        there = f"model.layers.{layer}"
        for ours, theirs in _PROJECTIONS.items():
            for part in ("weight", "bias"):
                name = f"blk.{layer}.{ours}.{part}"
                if name in file.tensors:
                    values = decoded(file, name)
                    if architecture == "llama" and ours in ("attn_q", "attn_k"):
                        heads = "head_count" if ours == "attn_q" else "head_count_kv"
                        heads = file.metadata[f"llama.attention.{heads}"]
                        values = neighbours_to_halves(values, heads)
                    if ours == "ffn_gate_inp_shexp":
                        values = values[None]
                    if architecture == "gpt-oss" and ours == "ffn_gate_inp":
                        theirs = "mlp.router"
                    if architecture != "qwen2moe":
                        theirs = theirs.replace("shared_expert.", "shared_experts.")
                    state[f"{there}.{theirs}.{part}"] = values
        if f"blk.{layer}.attn_sinks.weight" in file.tensors:
            state[f"{there}.self_attn.sinks"] = decoded(file, f"blk.{layer}.attn_sinks.weight")
        if f"blk.{layer}.attn_k_b.weight" in file.tensors:
            to_keys, to_values = (decoded(file, f"blk.{layer}.attn_{part}_b.weight") for part in ("k", "v"))
            both = torch.cat([to_keys.swapaxes(1, 2), to_values], dim=1).flatten(0, 1)
            state[f"{there}.self_attn.kv_b_proj.weight"] = both
        if f"blk.{layer}.exp_probs_b.bias" in file.tensors:
            state[f"{there}.mlp.gate.e_score_correction_bias"] = decoded(
                file, f"blk.{layer}.exp_probs_b.bias"
            )
        if f"blk.{layer}.ffn_gate.weight" in file.tensors:
            continue
        down = decoded(file, f"blk.{layer}.ffn_down_exps.weight")
        if f"blk.{layer}.ffn_gate_up_exps.weight" in file.tensors:
            gate, up = decoded(file, f"blk.{layer}.ffn_gate_up_exps.weight").chunk(2, dim=1)
        else:
            gate, up = (decoded(file, f"blk.{layer}.ffn_{part}_exps.weight") for part in ("gate", "up"))
        if architecture == "gpt-oss":
            # Columns of gate and up alternate, and matrices stand the other way.
            alternating = torch.stack([gate, up], dim=2).flatten(1, 2)
            state[f"{there}.mlp.experts.gate_up_proj"] = alternating.swapaxes(1, 2)
            state[f"{there}.mlp.experts.down_proj"] = down.swapaxes(1, 2)
            gate, up, down = (
                decoded(file, f"blk.{layer}.ffn_{part}_exps.bias") for part in ("gate", "up", "down")
            )
            state[f"{there}.mlp.experts.gate_up_proj_bias"] = torch.stack([gate, up], dim=2).flatten(1)
            state[f"{there}.mlp.experts.down_proj_bias"] = down
            continue
        state[f"{there}.mlp.experts.gate_up_proj"] = torch.cat([gate, up], dim=1)
        state[f"{there}.mlp.experts.down_proj"] = down
    return state
