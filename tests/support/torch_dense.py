"""More dense models by transformers: those whose names, norms or fused matrices are their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch_models
import torch_plain
import transformers
from torch_models import decoded, model_sizes, neighbours_to_halves, rope_parameters

from airjax.gguf import GGUF, open_gguf

Keys = Callable[..., Any]

_ATTENTION = {name: f"self_attn.{name[-1]}_proj" for name in ("attn_q", "attn_k", "attn_v")}
_ATTENTION["attn_output"] = "self_attn.o_proj"
_GATED = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_TWO_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_LATER_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_PLAIN = _ATTENTION | _GATED | _TWO_NORMS
_LIKE_GPT2 = {
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "attn_norm": "ln_1",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
_WIDE_MLP = {"ffn_up": "mlp.dense_h_to_4h", "ffn_down": "mlp.dense_4h_to_h"}


class _Twin(NamedTuple):
    """How transformers names and configures an architecture.

    Attributes:
      kind: of its classes.
      parts: of a layer, by their names in a GGUF file.
      options: of the configuration, from the file's keys.
      root: of the names.
      outside: embedding, layers, last norm, output.
      begins: names of what only the first layer reads.
      own_sizes: `options` has all of the sizes.
      permuted: the file holds rows of queries and keys in the order for rope on neighbours.
    """

    kind: str
    parts: Mapping[str, str]
    options: Callable[[Keys, GGUF], dict[str, Any]] = lambda key, file: {}
    root: str = "model"
    outside: tuple[str, str, str, str] = ("embed_tokens", "layers", "norm", "lm_head")
    permuted: bool = False
    begins: Mapping[str, str] = {}
    own_sizes: bool = False


def _gpt2_sizes(key: Keys) -> dict[str, Any]:
    return {
        "n_embd": key("embedding_length"),
        "n_layer": key("block_count"),
        "n_head": key("attention.head_count"),
        "n_inner": key("feed_forward_length"),
        "n_positions": key("context_length"),
        "layer_norm_epsilon": key("attention.layer_norm_epsilon"),
    }


def _partial(key: Keys) -> float:
    return key("rope.dimension_count") / key("attention.key_length")


def _layer_types(key: Keys) -> list[str]:
    return [
        "full_attention" if (layer + 1) % 4 == 0 else "sliding_attention"
        for layer in range(key("block_count"))
    ]


def _two_norms(file: GGUF) -> bool:
    return "blk.0.attn_norm_2.weight" in file.tensors


_TWINS: dict[str, _Twin] = {
    "mistral3": _Twin(
        "Ministral3",
        _PLAIN,
        lambda key, file: {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": key("rope.freq_base"),
                "factor": key("rope.scaling.factor"),
                "original_max_position_embeddings": key("rope.scaling.original_context_length"),
                "beta_fast": key("rope.scaling.yarn_beta_fast"),
                "beta_slow": key("rope.scaling.yarn_beta_slow"),
                "mscale": 1.0,
                "mscale_all_dim": key("rope.scaling.yarn_log_multiplier"),
                "llama_4_scaling_beta": key("attention.temperature_scale"),
            }
        },
        permuted=True,
    ),
    "falcon": _Twin(
        "Falcon",
        {
            "attn_qkv": "self_attention.query_key_value",
            "attn_output": "self_attention.dense",
            "attn_norm": "ln_mlp",
            "attn_norm_2": "ln_attn",
            **_WIDE_MLP,
        },
        lambda key, file: {
            "layer_norm_epsilon": key("attention.layer_norm_epsilon"),
            "num_kv_heads": key("attention.head_count_kv"),
            "new_decoder_architecture": _two_norms(file),
            "multi_query": True,
            "parallel_attn": True,
            "ffn_hidden_size": key("feed_forward_length"),
        },
        "transformer",
        ("word_embeddings", "h", "ln_f", "lm_head"),
    ),
    "command-r": _Twin(
        "Cohere",
        _ATTENTION | _GATED | _HEAD_NORMS | {"attn_norm": "input_layernorm"},
        lambda key, file: {
            "layer_norm_eps": key("attention.layer_norm_epsilon"),
            "use_qk_norm": True,
            "logit_scale": key("logit_scale"),
        },
    ),
    "cohere2": _Twin(
        "Cohere2",
        _ATTENTION | _GATED | {"attn_norm": "input_layernorm"},
        lambda key, file: {
            "layer_norm_eps": key("attention.layer_norm_epsilon"),
            "logit_scale": key("logit_scale"),
            "sliding_window": key("attention.sliding_window"),
            "layer_types": _layer_types(key),
        },
    ),
    "starcoder2": _Twin(
        "Starcoder2",
        _ATTENTION | _TWO_NORMS | {"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
        lambda key, file: {"norm_epsilon": key("attention.layer_norm_epsilon")},
    ),
    "stablelm": _Twin(
        "StableLm",
        _PLAIN,
        lambda key, file: {
            "layer_norm_eps": key("attention.layer_norm_epsilon"),
            "use_qkv_bias": "blk.0.attn_q.bias" in file.tensors,
            "qk_layernorm": "blk.0.attn_q_norm.weight" in file.tensors,
            "use_parallel_residual": "blk.0.ffn_norm.weight" not in file.tensors,
            "partial_rotary_factor": _partial(key),
        },
    ),
    "phi2": _Twin(
        "Phi",
        {
            **_ATTENTION,
            "attn_output": "self_attn.dense",
            "attn_norm": "input_layernorm",
            "ffn_up": "mlp.fc1",
            "ffn_down": "mlp.fc2",
        },
        lambda key, file: {
            "layer_norm_eps": key("attention.layer_norm_epsilon"),
            "partial_rotary_factor": _partial(key),
        },
        outside=("embed_tokens", "layers", "final_layernorm", "lm_head"),
    ),
    "gptneox": _Twin(
        "GPTNeoX",
        {
            "attn_qkv": "attention.query_key_value",
            "attn_output": "attention.dense",
            **_TWO_NORMS,
            **_WIDE_MLP,
        },
        lambda key, file: {
            "layer_norm_eps": key("attention.layer_norm_epsilon"),
            "use_parallel_residual": key("use_parallel_residual"),
            "partial_rotary_factor": _partial(key),
        },
        "gpt_neox",
        ("embed_in", "layers", "final_layer_norm", "lm_head"),
    ),
    "nemotron": _Twin(
        "Nemotron",
        _ATTENTION | _GATED | _TWO_NORMS,
        lambda key, file: {
            "norm_eps": key("attention.layer_norm_epsilon"),
            "partial_rotary_factor": _partial(key),
        },
    ),
    "arcee": _Twin("Arcee", _PLAIN, permuted=True),
    "internlm2": _Twin("Llama", _PLAIN, permuted=True),
    "ernie4_5": _Twin("Ernie4_5", _PLAIN),
    "exaone": _Twin("Llama", _PLAIN),
    "exaone4": _Twin(
        "Exaone4",
        _ATTENTION | _GATED | _LATER_NORMS | _HEAD_NORMS,
        lambda key, file: {
            "sliding_window": key("attention.sliding_window"),
            "layer_types": _layer_types(key),
        },
    ),
    "olmo2": _Twin(
        "Olmo3",
        _ATTENTION | _GATED | _LATER_NORMS | _HEAD_NORMS,
        lambda key, file: {
            "sliding_window": key("attention.sliding_window"),
            "layer_types": _layer_types(key),
            "rope_parameters": {
                "full_attention": rope_parameters(file, "olmo2", key("rope.freq_base")),
                "sliding_attention": {"rope_type": "default", "rope_theta": key("rope.freq_base")},
            },
        },
    ),
    "gemma": _Twin("Gemma", _PLAIN),
    "jais2": _Twin(
        "Jais2",
        _ATTENTION | _GATED | _TWO_NORMS,
        lambda key, file: {
            "layer_norm_eps": key("attention.layer_norm_epsilon"),
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    # What is read is a text, whose positions are the same in all sections of the rope.
    "qwen2vl": _Twin("Qwen2", _PLAIN),
    "qwen3vl": _Twin("Qwen3", _PLAIN | _HEAD_NORMS),
    "baichuan": _Twin("Llama", _PLAIN, permuted=True),
    "gpt2": _Twin(
        "GPT2",
        _LIKE_GPT2,
        lambda key, file: _gpt2_sizes(key),
        "transformer",
        ("wte", "h", "ln_f", "lm_head"),
        begins={"position_embd": "wpe"},
        own_sizes=True,
    ),
    "starcoder": _Twin(
        "GPTBigCode",
        _LIKE_GPT2,
        lambda key, file: _gpt2_sizes(key) | {"multi_query": True},
        "transformer",
        ("wte", "h", "ln_f", "lm_head"),
        begins={"position_embd": "wpe"},
        own_sizes=True,
    ),
    "bloom": _Twin(
        "Bloom",
        {
            "attn_qkv": "self_attention.query_key_value",
            "attn_output": "self_attention.dense",
            **_TWO_NORMS,
            **_WIDE_MLP,
        },
        lambda key, file: {
            "hidden_size": key("embedding_length"),
            "n_layer": key("block_count"),
            "n_head": key("attention.head_count"),
            "layer_norm_epsilon": key("attention.layer_norm_epsilon"),
        },
        "transformer",
        ("word_embeddings", "h", "ln_f", "lm_head"),
        begins={"token_embd_norm": "word_embeddings_layernorm"},
        own_sizes=True,
    ),
    "mpt": _Twin(
        "Mpt",
        {
            "attn_qkv": "attn.Wqkv",
            "attn_output": "attn.out_proj",
            "attn_norm": "norm_1",
            "ffn_norm": "norm_2",
            "ffn_up": "ffn.up_proj",
            "ffn_down": "ffn.down_proj",
        },
        lambda key, file: {
            "d_model": key("embedding_length"),
            "n_layers": key("block_count"),
            "n_heads": key("attention.head_count"),
            "expansion_ratio": key("feed_forward_length") // key("embedding_length"),
            "max_seq_len": key("context_length"),
            "layer_norm_epsilon": key("attention.layer_norm_epsilon"),
            "attn_config": {"clip_qkv": key("attention.clamp_kqv"), "alibi": True},
        },
        "transformer",
        ("wte", "blocks", "norm_f", "lm_head"),
        own_sizes=True,
    ),
    "xverse": _Twin("Llama", _PLAIN, permuted=True),
    "minicpm": _Twin(
        "Granite",
        _PLAIN,
        lambda key, file: {
            "logits_scaling": key("logit_scale"),
            "residual_multiplier": key("residual_scale"),
            "embedding_multiplier": key("embedding_scale"),
            "attention_multiplier": key("attention.key_length") ** -0.5,
        },
        permuted=True,
    ),
    "chatglm": _Twin(
        "Glm",
        _ATTENTION | _TWO_NORMS | {"ffn_up": "mlp.gate_up_proj", "ffn_down": "mlp.down_proj"},
        lambda key, file: {"attention_bias": True, "partial_rotary_factor": _partial(key)},
    ),
    "olmo": _Twin(
        "Olmo",
        _ATTENTION | _GATED,
        lambda key, file: {"clip_qkv": key("attention.clamp_kqv")},
        permuted=True,
    ),
    "hunyuan-dense": _Twin(
        "HunYuanDenseV1",
        _PLAIN | {"attn_q_norm": "self_attn.query_layernorm", "attn_k_norm": "self_attn.key_layernorm"},
    ),
    "apertus": _Twin(
        "Apertus",
        _ATTENTION
        | _GATED
        | _HEAD_NORMS
        | {"attn_norm": "attention_layernorm", "ffn_norm": "feedforward_layernorm"},
    ),
    "seed_oss": _Twin(
        "SeedOss",
        _ATTENTION
        | _GATED
        | {"attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm"},
        lambda key, file: {"attention_out_bias": False},
    ),
}


def torch_logits(path: Path, ids: Sequence[int]) -> np.ndarray:
    """Teacher-forced logits of every position, float32 `[T, V]`, of any architecture that has a twin."""
    with open_gguf(path) as file:
        architecture = file.metadata["general.architecture"]
        windowed = "olmo2.attention.sliding_window" in file.metadata
        if architecture in torch_plain.ARCHITECTURES:
            return torch_plain.torch_logits(path, ids)
        if architecture not in _TWINS or (architecture == "olmo2" and not windowed):
            return torch_models.torch_logits(path, ids)
        model = _model(file, architecture)
    with torch.inference_mode():
        return model(torch.tensor([list(ids)])).logits[0].numpy()


def _model(file: GGUF, architecture: str) -> Any:
    twin = _TWINS[architecture]

    def key(name: str) -> Any:
        return file.metadata[f"{architecture}.{name}"]

    options = model_sizes(file, architecture)
    rope = rope_parameters(file, architecture, key("rope.freq_base"))
    options |= {"rope_parameters": rope} | twin.options(key, file)
    if twin.own_sizes:
        shared = (
            "vocab_size",
            "tie_word_embeddings",
            "attn_implementation",
            "dtype",
            "use_cache",
            "pad_token_id",
        )
        options = {name: options[name] for name in shared} | twin.options(key, file)
    if "partial_rotary_factor" in options:
        options["rope_parameters"]["partial_rotary_factor"] = options["partial_rotary_factor"]
    if twin.kind == "Falcon":  # it has no width of its own
        del options["head_dim"]
    config = getattr(transformers, f"{twin.kind}Config")(**options)
    head = "LMHeadModel" if twin.kind == "GPT2" else "ForCausalLM"
    model = getattr(transformers, f"{twin.kind}{head}")(config)
    head = twin.outside[-1]
    missing, unexpected = model.load_state_dict(_state(file, architecture, twin), strict=False)
    tied = {f"{head}.weight"} if "output.weight" not in file.tensors else set()
    assert not unexpected and set(missing) <= tied, (missing, unexpected)
    model.tie_weights()
    return model.eval()


def _state(file: GGUF, architecture: str, twin: _Twin) -> dict[str, torch.Tensor]:
    embed, layers, norm, head = twin.outside
    outside = {"token_embd": f"{twin.root}.{embed}", "output_norm": f"{twin.root}.{norm}", "output": head}
    state = {}
    for name in file.tensors:
        stem, _, part = name.rpartition(".")
        values = decoded(file, name)
        if stem in outside:
            theirs = outside[stem]
        elif stem in twin.begins:
            theirs = f"{twin.root}.{twin.begins[stem]}"
        else:
            _, layer, short = stem.split(".")
            theirs = f"{twin.root}.{layers}.{layer}.{_part(file, twin, short)}"
            values = _rows(file, architecture, twin, short, values)
        if twin.kind in ("Nemotron", "Gemma") and stem.endswith("norm") and part == "weight":
            values = values - 1
        if twin.kind == "StableLm" and stem.endswith(("q_norm", "k_norm")):
            state |= {f"{theirs}.norms.{head}.weight": row for head, row in enumerate(values)}
        else:
            state[f"{theirs}.{part}"] = values
    if twin.kind == "Apertus":
        for name in ("alpha_n", "alpha_p", "beta", "eps"):
            for layer, number in enumerate(file.metadata[f"xielu.{name}"]):
                value = torch.tensor(number) if name in ("beta", "eps") else torch.tensor([number])
                state[f"{twin.root}.{layers}.{layer}.mlp.act_fn.{name}"] = value
    return state


def _part(file: GGUF, twin: _Twin, short: str) -> str:
    if twin.kind == "Falcon" and short == "attn_norm" and not _two_norms(file):
        return "input_layernorm"
    if twin.kind == "StableLm" and short in _HEAD_NORMS:
        return f"self_attn.{short[5]}_layernorm"
    return twin.parts[short]


def _rows(file: GGUF, architecture: str, twin: _Twin, short: str, values: torch.Tensor) -> torch.Tensor:
    """The rows of a tensor in transformers' order."""
    heads, groups = (file.metadata[f"{architecture}.attention.{n}"] for n in ("head_count", "head_count_kv"))
    if twin.permuted and short in ("attn_q", "attn_k"):
        return neighbours_to_halves(values, heads if short == "attn_q" else groups)
    if twin.kind == "GPT2" and values.ndim == 2:
        return values.T
    if short != "attn_qkv" or twin.kind in ("GPT2", "GPTBigCode", "Mpt"):
        return values
    # The queries of a group, its key and its value stand together.
    width = values.shape[0] // (heads + 2 * groups)
    q, k, v = values.split((heads * width, groups * width, groups * width))
    rest = values.shape[1:]
    parts = [y.reshape(groups, -1, width, *rest) for y in (q, k, v)]
    return torch.cat(parts, dim=1).reshape(values.shape)
