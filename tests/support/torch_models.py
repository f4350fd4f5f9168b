"""The same models by transformers, in float32, with weights that the gguf package decodes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from divergence import max_kl as max_kl

from airjax.gguf import GGUF, open_gguf

_PROJECTIONS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_FUSED = {
    "phi3": {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
    "glm4": {"ffn_up": "mlp.gate_up_proj"},
}
_PLAIN = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_QK = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_SANDWICH = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
# Whose converted files hold the rows of queries and keys in the order for rope on neighbours.
_NEIGHBOURS = ("llama", "granite", "smollm3")
_NORMS = {
    "llama": _PLAIN,
    "gemma3": _SANDWICH | _QK,
    "gemma2": _SANDWICH,
    "qwen2": _PLAIN,
    "qwen3": _PLAIN | _QK,
    "granite": _PLAIN,
    "smollm3": _PLAIN,
    "phi3": _PLAIN,
    "olmo2": {
        "post_attention_norm": "post_attention_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
        **_QK,
    },
    "glm4": {
        "attn_norm": "input_layernorm",
        "post_attention_norm": "post_self_attn_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "post_ffw_norm": "post_mlp_layernorm",
    },
}


def torch_logits(path: Path, ids: Sequence[int]) -> np.ndarray:
    """Teacher-forced logits of every position, float32 `[T, V]`.

    Args:
      path: a GGUF file of an architecture in `_NORMS`.
      ids: the tokens.
    """
    model = _model(path)
    with torch.inference_mode():
        return model(torch.tensor([list(ids)])).logits[0].numpy()


def torch_inside(path: Path, ids: Sequence[int]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Hidden states `[T, D]` before each layer and after the last norm, and attention `[N, T, T]` of each layer."""
    with torch.inference_mode():
        out = _model(path)(torch.tensor([list(ids)]), output_hidden_states=True, output_attentions=True)
    return [part[0].numpy() for part in out.hidden_states], [part[0].numpy() for part in out.attentions]


def torch_beams(
    path: Path, ids: Sequence[int], beams: int, max_tokens: int, stop_ids: Sequence[int], length_power: float
) -> tuple[list[tuple[int, ...]], list[float]]:
    """What transformers' beam search finds: continuations without padding, and their scores, the best first."""
    model = _model(path)
    with torch.inference_mode():
        out = model.generate(
            torch.tensor([list(ids)]),
            attention_mask=torch.ones((1, len(ids)), dtype=torch.long),
            generation_config=transformers.GenerationConfig(
                num_beams=beams,
                num_return_sequences=beams,
                max_new_tokens=max_tokens,
                length_penalty=length_power,
                do_sample=False,
                eos_token_id=list(stop_ids) or None,
                pad_token_id=0,
                return_dict_in_generate=True,
                output_scores=True,
                use_cache=False,
            ),
        )
    found = []
    for row in out.sequences[:, len(ids) :].tolist():
        stops = [at for at, token in enumerate(row) if token in stop_ids]
        found.append(tuple(row[: stops[0] + 1] if stops else row))
    return found, out.sequences_scores.tolist()


def _model(path: Path) -> Any:
    with open_gguf(path) as file:
        architecture = file.metadata["general.architecture"]
        model = {"llama": _llama, "gemma3": _gemma3}.get(architecture, _decoder)(file)
        missing, unexpected = model.load_state_dict(_state(file, architecture), strict=False)
        tied = {"lm_head.weight"} if "output.weight" not in file.tensors else set()
        assert not unexpected and set(missing) <= tied, (missing, unexpected)
        if "rope_freqs.weight" in file.tensors:
            model.model.rotary_emb.inv_freq /= decoded(file, "rope_freqs.weight")
    model.tie_weights()
    return model.eval()


def model_sizes(file: GGUF, architecture: str) -> dict[str, Any]:
    def key(name: str, default: Any = None) -> Any:
        return file.metadata.get(f"{architecture}.{name}", default)

    heads, d = key("attention.head_count"), key("embedding_length")
    return {
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "hidden_size": d,
        "intermediate_size": key("feed_forward_length"),
        "num_hidden_layers": key("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": key("attention.head_count_kv"),
        "head_dim": key("attention.key_length", d // heads),
        "max_position_embeddings": key("context_length"),
        "rms_norm_eps": key("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attn_implementation": "eager",
        "dtype": "float32",
        "use_cache": False,
        "pad_token_id": None,
    }


def rope_parameters(file: GGUF, architecture: str, base: float) -> dict[str, Any]:
    if file.metadata.get(f"{architecture}.rope.scaling.type") == "linear":
        factor = file.metadata[f"{architecture}.rope.scaling.factor"]
        return {"rope_type": "linear", "factor": factor, "rope_theta": base}
    if file.metadata.get(f"{architecture}.rope.scaling.type") == "yarn":
        return {
            "rope_type": "yarn",
            "factor": file.metadata[f"{architecture}.rope.scaling.factor"],
            "original_max_position_embeddings": file.metadata[
                f"{architecture}.rope.scaling.original_context_length"
            ],
            "rope_theta": base,
        }
    if "rope_factors_long.weight" in file.tensors:
        return {
            "rope_type": "longrope",
            "rope_theta": base,
            "original_max_position_embeddings": file.metadata[
                f"{architecture}.rope.scaling.original_context_length"
            ],
            "short_factor": decoded(file, "rope_factors_short.weight").tolist(),
            "long_factor": decoded(file, "rope_factors_long.weight").tolist(),
        }
    return {"rope_type": "default", "rope_theta": base}


def _decoder(file: GGUF) -> Any:
    architecture = file.metadata["general.architecture"]

    def key(name: str, default: Any = None) -> Any:
        return file.metadata.get(f"{architecture}.{name}", default)

    rope = rope_parameters(file, architecture, key("rope.freq_base"))
    width = key("attention.key_length")
    names: dict[str, tuple[str, dict[str, Any]]] = {
        "qwen2": ("Qwen2", {}),
        "qwen3": ("Qwen3", {}),
        "olmo2": ("Olmo2", {}),
        "smollm3": ("SmolLM3", {"no_rope_layer_interval": 4}),
        "phi3": (
            "Phi3",
            {
                "sliding_window": key("attention.sliding_window"),
                "original_max_position_embeddings": key("rope.scaling.original_context_length", 4096),
            },
        ),
        "granite": (
            "Granite",
            {
                "logits_scaling": key("logit_scale"),
                "residual_multiplier": key("residual_scale"),
                "embedding_multiplier": key("embedding_scale"),
                "attention_multiplier": key("attention.scale"),
            },
        ),
        "gemma2": (
            "Gemma2",
            {
                "query_pre_attn_scalar": width,
                "sliding_window": key("attention.sliding_window"),
                "attn_logit_softcapping": key("attn_logit_softcapping"),
                "final_logit_softcapping": key("final_logit_softcapping"),
            },
        ),
        "glm4": (
            "Glm4",
            {"attention_bias": True, "partial_rotary_factor": key("rope.dimension_count", width) / width},
        ),
    }
    name, options = names[architecture]
    if architecture == "glm4":
        rope["partial_rotary_factor"] = options["partial_rotary_factor"]
    config = getattr(transformers, f"{name}Config")(
        **model_sizes(file, architecture), rope_parameters=rope, **options
    )
    return getattr(transformers, f"{name}ForCausalLM")(config)


def _llama(file: GGUF) -> Any:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **model_sizes(file, "llama"),
            attention_bias="blk.0.attn_q.bias" in file.tensors,
            mlp_bias="blk.0.ffn_up.bias" in file.tensors,
            rope_parameters=rope_parameters(file, "llama", file.metadata["llama.rope.freq_base"]),
        )
    )


def _gemma3(file: GGUF) -> Any:
    sizes = model_sizes(file, "gemma3")
    return transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(
            **sizes,
            query_pre_attn_scalar=_scaled_by(sizes),
            sliding_window=file.metadata["gemma3.attention.sliding_window"],
            sliding_window_pattern=file.metadata.get("gemma3.attention.sliding_window_pattern", 6),
            final_logit_softcapping=file.metadata.get("gemma3.final_logit_softcapping"),
            rope_parameters={
                "full_attention": rope_parameters(file, "gemma3", file.metadata["gemma3.rope.freq_base"]),
                "sliding_attention": {
                    "rope_type": "default",
                    "rope_theta": file.metadata.get("gemma3.rope.freq_base_swa", 10_000.0),
                },
            },
        )
    )


def _scaled_by(sizes: dict[str, Any]) -> int:
    """Google's configuration of the 27B model, the one with 62 layers, has D / heads here."""
    if sizes["num_hidden_layers"] == 62:
        return sizes["hidden_size"] // sizes["num_attention_heads"]
    return sizes["head_dim"]


def _state(file: GGUF, architecture: str) -> dict[str, torch.Tensor]:
    one = (
        1.0 if architecture.startswith("gemma") else 0.0
    )  # transformers adds it to each of Gemma's norm weights
    state = {
        "model.embed_tokens.weight": decoded(file, "token_embd.weight"),
        "model.norm.weight": decoded(file, "output_norm.weight") - one,
    }
    if "output.weight" in file.tensors:
        state["lm_head.weight"] = decoded(file, "output.weight")
    for layer in range(file.metadata[f"{architecture}.block_count"]):
        for ours, theirs in _NORMS[architecture].items():
            values = decoded(file, f"blk.{layer}.{ours}.weight")
            state[f"model.layers.{layer}.{theirs}.weight"] = values - one
        for ours, theirs in (_PROJECTIONS | _FUSED.get(architecture, {})).items():
            for part in ("weight", "bias"):
                name = f"blk.{layer}.{ours}.{part}"
                if name in file.tensors:
                    values = decoded(file, name)
                    if architecture in _NEIGHBOURS and ours in ("attn_q", "attn_k"):
                        heads = "head_count" if ours == "attn_q" else "head_count_kv"
                        values = neighbours_to_halves(
                            values, file.metadata[f"{architecture}.attention.{heads}"]
                        )
                    state[f"model.layers.{layer}.{theirs}.{part}"] = values
    return state


def decoded(file: GGUF, name: str) -> torch.Tensor:
    info = file.tensors[name]
    values = gguf.quants.dequantize(file.raw(name), info.type) if info.type.name != "F32" else file.raw(name)
    return torch.from_numpy(np.array(values.view(np.float32)).reshape(info.shape))


def neighbours_to_halves(values: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows whose rope turns neighbours, in the order whose rope turns halves."""
    pairs = values.reshape(heads, -1, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)
