"""Tiny Gemma 3n models with random weights as GGUF files, and their twins in transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType as GGMLType
from torch_models import decoded
from toy_gemma4 import OUTSIDE, PARTS
from toy_models import Toy, wide_blocks
from toy_vocabularies import spm_metadata

from airjax.gguf import open_gguf

_STREAMS, _RANK = 4, 8
# Standard deviations above which a gate opens, and the share of gates that stays shut by it.
_SPARSITY, _SHUT = 0.5244005, 0.7
_PARTS = PARTS | {
    "altup_correct_coef": "altup.correction_coefs",
    "altup_predict_coef": "altup.prediction_coefs",
    "altup_router": "altup.modality_router",
    "altup_router_norm": "altup.router_norm",
    "laurel_l": "laurel.linear_left",
    "laurel_r": "laurel.linear_right",
    "laurel_post_norm": "laurel.post_laurel_norm",
}


def toy_gemma3n(
    path: Path,
    *,
    per_layer: int = 16,
    shared: int = 3,
    sparse: int = 2,
    block_type: str = "F32",
    layers: int = 6,
    every: int = 2,
    wide: bool = False,
    separate_output: bool = False,
    values: dict[str, Any] | None = None,
    without: Sequence[str] = (),
) -> Path:
    """Writes a gemma3n. Layers that read another one's cache have keys and values of their own, as in converted files.

    Args:
      path: the file.
      per_layer: elements of a token's embedding for each layer.
      shared: so many layers at the end read the cache of others.
      sparse: so many layers at the beginning have few open gates.
      block_type: of all matrices but the small ones.
      layers: how many.
      every: each so manyth layer has no window.
      wide: the last feed-forward part is twice as wide.
      separate_output: an output matrix of its own.
      values: metadata that replaces its own.
      without: keys that the file lacks.
    """
    d, f, heads, kv_heads = (256, 512, 4, 2) if wide_blocks(block_type) else (64, 128, 4, 2)
    width = d // heads
    toy = Toy(path, "gemma3n", spm_metadata(), GGMLType[block_type], 0)
    widths = [f] * (layers - 1) + [2 * f if wide else f]
    toy.sizes(layers, d, widths if wide else f, heads, kv_heads, context=512)
    metadata: dict[str, Any] = {
        "rope.freq_base": 1_000_000.0,
        "attention.key_length": width,
        "attention.value_length": width,
        "attention.sliding_window": 8,
        "attention.sliding_window_pattern": [(layer + 1) % every > 0 for layer in range(layers)],
        # As published files have it.
        "attention.shared_kv_layers": float(shared),
        "embedding_length_per_layer_input": per_layer,
        "altup.num_inputs": _STREAMS,
        "altup.active_idx": 0,
        "activation_sparsity_scale": [_SPARSITY] * sparse + [float("-inf")] * (layers - sparse),
        "final_logit_softcapping": 3.0,
    }
    for key, value in (metadata | (values or {})).items():
        if key not in without:
            toy.value(key, value)
    toy.outside(d, separate_output)
    toy.matrix("per_layer_token_embd.weight", toy.vocabulary_size, layers * per_layer, 2.0)
    toy.matrix("per_layer_model_proj.weight", layers * per_layer, d)
    toy.norm("per_layer_proj_norm.weight", per_layer)
    for name in ("altup_proj", "altup_unembd_proj"):
        toy.stack(f"{name}.weight", _STREAMS - 1, d, d)
    for layer, wide_f in enumerate(widths):
        block, q, kv = f"blk.{layer}", heads * width, kv_heads * width
        for name, (rows, columns) in {
            "attn_q": (q, d),
            "attn_k": (kv, d),
            "attn_v": (kv, d),
            "attn_output": (d, q),
            "ffn_gate": (wide_f, d),
            "ffn_up": (wide_f, d),
            "ffn_down": (d, wide_f),
            "inp_gate": (per_layer, d),
            "proj": (d, per_layer),
        }.items():
            toy.matrix(f"{block}.{name}.weight", rows, columns)
        for name, shape in {
            "altup_correct_coef": (_STREAMS, _STREAMS),
            "altup_predict_coef": (_STREAMS**2, _STREAMS),
            # Its inputs are divided by d.
            "altup_router": (_STREAMS, d),
            "laurel_l": (_RANK, d),
            "laurel_r": (d, _RANK),
        }.items():
            scale = d**0.5 if name == "altup_router" else 0.3
            toy.tensor(f"{block}.{name}.weight", toy.generator.normal(scale=scale, size=shape))
        norms = ["attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm", "post_norm"]
        for name in (*norms, "altup_router_norm", "altup_correct_scale", "laurel_post_norm"):
            toy.norm(f"{block}.{name}.weight", d)
        for name in ("attn_q_norm", "attn_k_norm"):
            toy.norm(f"{block}.{name}.weight", width)
    return toy.write()


def torch_gemma3n_logits(path: Path, ids: Sequence[int]) -> np.ndarray:
    """Teacher-forced logits of every position, float32 `[T, V]`."""
    with open_gguf(path) as file:

        def key(name: str, default: Any = None) -> Any:
            return file.metadata.get(f"gemma3n.{name}", default)

        n_layers, vocabulary = key("block_count"), file.tensors["token_embd.weight"].shape[0]
        local = key("attention.sliding_window_pattern", [(layer + 1) % 5 > 0 for layer in range(n_layers)])
        shared = int(key("attention.shared_kv_layers"))
        config = transformers.Gemma3nTextConfig(
            vocab_size=vocabulary,
            vocab_size_per_layer_input=vocabulary,
            hidden_size=key("embedding_length"),
            hidden_size_per_layer_input=key("embedding_length_per_layer_input"),
            intermediate_size=np.broadcast_to(key("feed_forward_length"), n_layers).tolist(),
            num_hidden_layers=n_layers,
            num_attention_heads=key("attention.head_count"),
            num_key_value_heads=key("attention.head_count_kv"),
            head_dim=key("attention.key_length"),
            max_position_embeddings=key("context_length"),
            rms_norm_eps=key("attention.layer_norm_rms_epsilon"),
            sliding_window=key("attention.sliding_window"),
            layer_types=["sliding_attention" if own else "full_attention" for own in local],
            final_logit_softcapping=key("final_logit_softcapping", 30.0),
            activation_sparsity_pattern=[_SHUT * (own > 0) for own in key("activation_sparsity_scale")],
            altup_num_inputs=key("altup.num_inputs", 4),
            num_kv_shared_layers=shared,
            laurel_rank=_RANK,
            attn_implementation="eager",
            dtype="float32",
            use_cache=False,
            pad_token_id=None,
        )
        model = transformers.Gemma3nForCausalLM(config)
        state = {
            f"model.{theirs}.weight": decoded(file, f"{ours}.weight") for ours, theirs in OUTSIDE.items()
        }
        for ours, theirs in (
            ("altup_proj", "altup_projections"),
            ("altup_unembd_proj", "altup_unembed_projections"),
        ):
            for at, matrix in enumerate(decoded(file, f"{ours}.weight")):
                state[f"model.{theirs}.{at}.weight"] = matrix
        for layer in range(n_layers):
            there = f"model.layers.{layer}"
            for ours, theirs in _PARTS.items():
                if layer < n_layers - shared or not ours.startswith(("attn_k", "attn_v")):
                    state[f"{there}.{theirs}.weight"] = decoded(file, f"blk.{layer}.{ours}.weight")
            scale = decoded(file, f"blk.{layer}.altup_correct_scale.weight")
            state[f"{there}.altup.correct_output_scale"] = scale
        missing, unexpected = model.load_state_dict(state, strict=False)
        assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()
    with torch.inference_mode():
        return model.eval()(torch.tensor([list(ids)])).logits[0].numpy()
