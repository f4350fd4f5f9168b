"""Tiny Gemma 4 models with random weights as GGUF files, and their twins in transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType as GGMLType
from torch_models import decoded
from toy_models import Toy, wide_blocks
from toy_vocabularies import gemma4_metadata

from airjax.gguf import open_gguf

_COUNT, _USED = 8, 3
# What Gemma 3n has too.
PARTS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "inp_gate": "per_layer_input_gate",
    "proj": "per_layer_projection",
    "post_norm": "post_per_layer_input_norm",
}
_WITH_EXPERTS = {
    "pre_ffw_norm_2": "pre_feedforward_layernorm_2",
    "post_ffw_norm_1": "post_feedforward_layernorm_1",
    "post_ffw_norm_2": "post_feedforward_layernorm_2",
    "ffn_gate_inp": "router.proj",
}
OUTSIDE = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "per_layer_token_embd": "embed_tokens_per_layer",
    "per_layer_model_proj": "per_layer_model_projection",
    "per_layer_proj_norm": "per_layer_projection_norm",
}


def toy_gemma4(
    path: Path,
    *,
    experts: bool = False,
    fused: bool = True,
    own_values: bool = False,
    per_layer: int = 0,
    shared: int = 0,
    unused: bool = False,
    block_type: str = "F32",
    layers: int = 4,
    separate_output: bool = False,
    values: dict[str, Any] | None = None,
) -> Path:
    """Writes a gemma4, each second of which has no window, wider heads and fewer of them.

    Args:
      path: the file.
      experts: each layer has some beside its feed-forward part.
      fused: gate and up of the experts are one stack.
      own_values: layers without a window have a matrix of values.
      per_layer: elements of a token's embedding for each layer; 0 for none.
      shared: so many layers at the end have no keys and values, and a feed-forward part of twice the width.
      unused: their matrices are in the file nevertheless.
      block_type: of all matrices.
      layers: how many, an even number.
      separate_output: an output matrix of its own.
      values: metadata that replaces its own.
    """
    d, f, heads = (256, 512, 4) if wide_blocks(block_type) else (64, 128, 4)
    toy = Toy(path, "gemma4", gemma4_metadata(), GGMLType[block_type], 0)
    local = [True, False] * (layers // 2)
    # Keys and values of all heads differ in size, too. Only models without values of their own have fewer heads.
    kv_heads, width = {True: 2, False: 2 if own_values else 1}, {True: d // 4, False: d}
    widths = [f] * (layers - shared) + [2 * f] * shared
    toy.sizes(
        len(local), d, widths if shared else f, heads, 2 if shared else [kv_heads[own] for own in local], 512
    )
    metadata: dict[str, Any] = {
        "rope.freq_base": 1_000_000.0,
        "rope.freq_base_swa": 10_000.0,
        "rope.dimension_count": width[False],
        "rope.dimension_count_swa": width[True],
        "attention.key_length": width[False],
        "attention.value_length": width[False],
        "attention.key_length_swa": width[True],
        "attention.value_length_swa": width[True],
        "attention.sliding_window": 8,
        "attention.sliding_window_pattern": local,
        "attention.shared_kv_layers": shared,
        "embedding_length_per_layer_input": per_layer,
        "final_logit_softcapping": 3.0,
    }
    if experts:
        metadata |= {
            "expert_count": _COUNT,
            "expert_used_count": _USED,
            "expert_feed_forward_length": f // 2,
        }
    for key, value in (metadata | (values or {})).items():
        toy.value(key, value)
    toy.outside(d, separate_output)
    if per_layer:
        toy.matrix("per_layer_token_embd.weight", toy.vocabulary_size, layers * per_layer, 2.0)
        toy.matrix("per_layer_model_proj.weight", layers * per_layer, d)
        toy.norm("per_layer_proj_norm.weight", per_layer)
    turned = width[False] // 8
    toy.tensor("rope_freqs.weight", np.array([1.0] * turned + [1e30] * (width[False] // 2 - turned)))
    for layer, own in enumerate(local):
        block, kv, wide = f"blk.{layer}", kv_heads[own] * width[own], widths[layer]
        writes_kv = unused or layer < layers - shared
        matrices = {"attn_q": (heads * width[own], d)}
        if writes_kv:
            matrices["attn_k"] = (kv, d)
        if writes_kv and (own or own_values):
            matrices["attn_v"] = (kv, d)
        matrices |= {"attn_output": (d, heads * width[own])}
        matrices |= {"ffn_gate": (wide, d), "ffn_up": (wide, d), "ffn_down": (d, wide)}
        if per_layer:
            matrices |= {"inp_gate": (per_layer, d), "proj": (d, per_layer)}
        for name, (rows, columns) in matrices.items():
            toy.matrix(f"{block}.{name}.weight", rows, columns)
        norms = ["attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"]
        norms += ["post_norm"] if per_layer else []
        if experts:
            norms += ["pre_ffw_norm_2", "post_ffw_norm_1", "post_ffw_norm_2"]
            toy.tensor(f"{block}.ffn_gate_inp.weight", toy.generator.normal(scale=2, size=(_COUNT, d)))
            toy.tensor(f"{block}.ffn_gate_inp.scale", toy.generator.uniform(0.5, 1.5, d))
            toy.tensor(f"{block}.ffn_down_exps.scale", toy.generator.uniform(0.5, 1.5, _COUNT))
            stacks = {"ffn_gate_up_exps": f} if fused else {"ffn_gate_exps": f // 2, "ffn_up_exps": f // 2}
            for name, rows in stacks.items():
                toy.stack(f"{block}.{name}.weight", _COUNT, rows, d)
            toy.stack(f"{block}.ffn_down_exps.weight", _COUNT, d, f // 2)
        for name in norms:
            toy.norm(f"{block}.{name}.weight", d)
        for name in ("attn_q_norm", "attn_k_norm") if writes_kv else ("attn_q_norm",):
            toy.norm(f"{block}.{name}.weight", width[own])
        toy.tensor(f"{block}.layer_output_scale.weight", toy.generator.uniform(0.5, 1.5, 1))
    return toy.write()


def torch_gemma4_logits(path: Path, ids: Sequence[int]) -> np.ndarray:
    """Teacher-forced logits of every position, float32 `[T, V]`."""
    with open_gguf(path) as file:

        def key(name: str, default: Any = None) -> Any:
            return file.metadata.get(f"gemma4.{name}", default)

        local = key("attention.sliding_window_pattern")
        kv_heads = np.broadcast_to(key("attention.head_count_kv"), len(local))
        config = transformers.Gemma4TextConfig(
            vocab_size=file.tensors["token_embd.weight"].shape[0],
            hidden_size=key("embedding_length"),
            intermediate_size=int(np.atleast_1d(key("feed_forward_length"))[0]),
            num_hidden_layers=key("block_count"),
            num_attention_heads=key("attention.head_count"),
            num_key_value_heads=int(kv_heads[0]),
            num_global_key_value_heads=int(kv_heads[1]),
            head_dim=key("attention.key_length_swa"),
            global_head_dim=key("attention.key_length"),
            attention_k_eq_v="blk.1.attn_v.weight" not in file.tensors,
            max_position_embeddings=key("context_length"),
            rms_norm_eps=key("attention.layer_norm_rms_epsilon"),
            sliding_window=key("attention.sliding_window"),
            layer_types=["sliding_attention" if own else "full_attention" for own in local],
            final_logit_softcapping=key("final_logit_softcapping"),
            hidden_size_per_layer_input=key("embedding_length_per_layer_input"),
            vocab_size_per_layer_input=file.tensors["token_embd.weight"].shape[0],
            num_kv_shared_layers=int(key("attention.shared_kv_layers")),
            use_double_wide_mlp=key("attention.shared_kv_layers") > 0,
            enable_moe_block=key("expert_count") is not None,
            num_experts=key("expert_count"),
            top_k_experts=key("expert_used_count"),
            moe_intermediate_size=key("expert_feed_forward_length"),
            attn_implementation="eager",
            dtype="float32",
            use_cache=False,
            pad_token_id=None,
            rope_parameters={
                "full_attention": {
                    "rope_type": "proportional",
                    "partial_rotary_factor": 0.25,
                    "rope_theta": key("rope.freq_base"),
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": key("rope.freq_base_swa")},
            },
        )
        model = transformers.Gemma4ForCausalLM(config)
        state = {
            f"model.{theirs}.weight": decoded(file, f"{ours}.weight")
            for ours, theirs in OUTSIDE.items()
            if f"{ours}.weight" in file.tensors
        }
        own_kv = key("block_count") - int(key("attention.shared_kv_layers"))
        for layer in range(key("block_count")):
            there = f"model.layers.{layer}"
            for ours, theirs in (PARTS | _WITH_EXPERTS).items():
                unused = layer >= own_kv and ours.startswith(("attn_k", "attn_v"))
                if f"blk.{layer}.{ours}.weight" in file.tensors and not unused:
                    state[f"{there}.{theirs}.weight"] = decoded(file, f"blk.{layer}.{ours}.weight")
            state[f"{there}.layer_scalar"] = decoded(file, f"blk.{layer}.layer_output_scale.weight")
            if key("expert_count") is not None:
                stacks = (
                    ("gate_up",) if f"blk.{layer}.ffn_gate_up_exps.weight" in file.tensors else ("gate", "up")
                )
                both = [decoded(file, f"blk.{layer}.ffn_{name}_exps.weight") for name in stacks]
                state[f"{there}.experts.gate_up_proj"] = torch.cat(both, dim=1)
                state[f"{there}.experts.down_proj"] = decoded(file, f"blk.{layer}.ffn_down_exps.weight")
                state[f"{there}.router.scale"] = decoded(file, f"blk.{layer}.ffn_gate_inp.scale")
                state[f"{there}.router.per_expert_scale"] = decoded(file, f"blk.{layer}.ffn_down_exps.scale")
        missing, unexpected = model.load_state_dict(state, strict=False)
        assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()
    with torch.inference_mode():
        # Asked for what passes between the layers, it takes no short cut, which needs an embedding for each layer.
        return model.eval()(torch.tensor([list(ids)]), output_hidden_states=True).logits[0].numpy()
