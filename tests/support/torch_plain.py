"""Decoders that transformers does not have, in plain torch: written from the models' papers, with nothing of airjax's.

What a layer has is read off its tensors; what tensors don't say is in `ARCHITECTURES`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional
from torch_models import decoded

from airjax.gguf import GGUF, open_gguf


class _Form(NamedTuple):
    """What tensors don't say.

    Attributes:
      neighbours: rope turns pairs of neighbours, else of halves.
      ffn_norm: name of the norm before the feed-forward part.
      normalized: the weights of the chosen experts sum to one, though the file does not say it.
      scores: of the router, before the choice.
      parallel: the feed-forward part takes what attention takes.
      alibi: of the scores, where the file does not say it.
      scale: of the scores, as a power of a head's width.
      activation: of gates.
      router: looks at the "h" of the experts, or at the layer's "input".
      every: each so manyth layer from the first on has neither window nor rope.
      missing: metadata, where the file does not say it.
    """

    neighbours: bool = False
    ffn_norm: str = "ffn_norm"
    normalized: bool = False
    scores: str = "softmax"
    parallel: bool = False
    alibi: float = 0.0
    scale: float = -0.5
    activation: str = "silu"
    router: str = "h"
    every: int = 0
    missing: Mapping[str, float] = {}


_GROK = {
    "embedding_scale": 78.38367176906169,
    "logit_scale": 0.5773502691896257,
    "attention.output_scale": 0.08838834764831845,
    "attn_logit_softcapping": 30.0,
}
ARCHITECTURES = {
    "qwen": _Form(),
    "codeshell": _Form(),
    "dbrx": _Form(ffn_norm="attn_output_norm", normalized=True),
    "bailingmoe": _Form(neighbours=True),
    "bailingmoe2": _Form(scores="sigmoid"),
    "deepseek": _Form(neighbours=True),
    "orion": _Form(),
    "plamo": _Form(parallel=True),
    "refact": _Form(alibi=8.0),
    "jais": _Form(alibi=8.0, scale=-1.0),
    "pangu-embedded": _Form(),
    "smallthinker": _Form(normalized=True, scores="sigmoid", activation="relu", router="input", every=4),
    "arctic": _Form(neighbours=True, normalized=True),
    "deci": _Form(neighbours=True),
    "openelm": _Form(),
    "grok": _Form(normalized=True, activation="gelu", missing=_GROK),
}


def torch_logits(path: Path, ids: Sequence[int]) -> np.ndarray:
    """Teacher-forced logits of every position, float32 `[T, V]`."""
    with open_gguf(path) as file, torch.inference_mode():
        return _Plain(file).logits(torch.tensor(list(ids))).numpy()


class _Plain:
    def __init__(self, file: GGUF) -> None:
        self.file = file
        self.architecture = file.metadata["general.architecture"]
        self.form = ARCHITECTURES[self.architecture]

    def key(self, name: str, default: Any = None) -> Any:
        return self.file.metadata.get(f"{self.architecture}.{name}", self.form.missing.get(name, default))

    def has(self, name: str) -> bool:
        return name in self.file.tensors

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        bias = decoded(self.file, f"{name}.bias") if self.has(f"{name}.bias") else None
        return functional.linear(x, decoded(self.file, f"{name}.weight"), bias)

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        weight = decoded(self.file, f"{name}.weight")
        if (eps := self.key("attention.layer_norm_epsilon")) is not None:
            bias = decoded(self.file, f"{name}.bias") if self.has(f"{name}.bias") else None
            return functional.layer_norm(x, weight.shape, weight, bias, eps)
        return functional.rms_norm(x, weight.shape, weight, self.key("attention.layer_norm_rms_epsilon"))

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        x = decoded(self.file, "token_embd.weight")[ids] * self.key("embedding_scale", 1.0)
        for layer in range(self.key("block_count")):
            x = self.block(x, layer)
        x = self.norm(x, "output_norm")
        logits = self.linear(x, "output" if self.has("output.weight") else "token_embd")
        return bounded(logits * self.key("logit_scale", 1.0), self.key("final_logit_softcapping", 0.0))

    def block(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        block, before = f"blk.{layer}", x
        if self.has(f"{block}.attn_norm.weight"):
            h = self.norm(x, f"{block}.attn_norm")
            x = x + self.after(self.attention(h, layer), block, ("attn_output_norm",))
        if self.form.parallel:
            return x + self.feed_forward(h, block, h)
        if self.has(f"{block}.ffn_norm_exps.weight"):
            experts = self.feed_forward(self.norm(before, f"{block}.ffn_norm_exps"), block, before)
            return x + experts + self.gated(self.norm(x, f"{block}.ffn_norm"), block, "")
        if not self.has(f"{block}.{self.form.ffn_norm}.weight"):
            return x
        made = self.feed_forward(self.norm(x, f"{block}.{self.form.ffn_norm}"), block, before)
        return x + self.after(made, block, ("post_ffw_norm", "layer_output_norm"))

    def after(self, x: torch.Tensor, block: str, names: Sequence[str]) -> torch.Tensor:
        """Normed by what the layer has of these, which it does not have for something else."""
        for name in names:
            if self.has(f"{block}.{name}.weight") and name != self.form.ffn_norm:
                x = self.norm(x, f"{block}.{name}")
        return x

    def of_layer(self, name: str, layer: int) -> int:
        value = self.key(name)
        return int(value if np.ndim(value) == 0 else value[layer])

    def attention(self, h: torch.Tensor, layer: int) -> torch.Tensor:
        block, width = f"blk.{layer}", self.key("attention.key_length")
        heads, groups = (
            self.of_layer(f"attention.{name}", layer) for name in ("head_count", "head_count_kv")
        )
        if groups == 0:  # a matrix in its place
            return self.linear(h, f"{block}.attn_output")
        if self.has(f"{block}.attn_qkv.weight"):
            both = self.linear(h, f"{block}.attn_qkv")
            q, k, v = both.split((heads * width, groups * width, groups * width), dim=-1)
        else:
            q, k, v = (self.linear(h, f"{block}.attn_{name}") for name in "qkv")
        if (bound := self.key("attention.clamp_kqv")) is not None:
            q, k, v = (part.clamp(-bound, bound) for part in (q, k, v))
        q, k, v = (part.reshape(len(h), -1, width).swapaxes(0, 1) for part in (q, k, v))  # [N, T, H]
        if self.has(f"{block}.attn_q_norm.weight"):
            q, k = self.norm(q, f"{block}.attn_q_norm"), self.norm(k, f"{block}.attn_k_norm")
        window = self.key("attention.sliding_window") if self.form.every else None
        whole = bool(self.form.every) and layer % self.form.every == 0
        alibi = self.key("attention.max_alibi_bias", self.form.alibi)
        if not alibi and not whole:
            q, k = self.turned(q), self.turned(k)
        k, v = (part.repeat_interleave(heads // groups, dim=0) for part in (k, v))
        at = torch.arange(len(h))
        behind = at[:, None] - at
        seen = (behind >= 0) & (behind < (len(h) if window is None or whole else window))
        slopes = 2.0 ** (-alibi * torch.arange(1, heads + 1) / heads) if alibi else torch.zeros(heads)
        mask = (-slopes[:, None, None] * behind).masked_fill(~seen, float("-inf"))
        scale = self.key("attention.output_scale", width**self.form.scale)
        scores = bounded(q @ k.mT * scale, self.key("attn_logit_softcapping", 0.0)) + mask
        out = scores.softmax(-1) @ v
        return self.linear(out.swapaxes(0, 1).reshape(len(h), -1), f"{block}.attn_output")

    def turned(self, x: torch.Tensor) -> torch.Tensor:
        width = self.key("rope.dimension_count", x.shape[-1])
        rates = self.key("rope.freq_base") ** (-torch.arange(0, width, 2).double() / width)
        angles = (torch.arange(x.shape[1]).double()[:, None] * rates).float()
        turn = torch.polar(torch.ones_like(angles), angles)  # [T, R / 2]
        part, rest = x[..., :width], x[..., width:]
        pairs = part.unflatten(-1, (-1, 2)) if self.form.neighbours else part.unflatten(-1, (2, -1)).mT
        out = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
        out = out if self.form.neighbours else out.mT
        return torch.cat([out.flatten(-2), rest], dim=-1)

    def feed_forward(self, h: torch.Tensor, block: str, before: torch.Tensor) -> torch.Tensor:
        if not self.has(f"{block}.ffn_gate_inp.weight"):
            return self.gated(h, block, "")
        logits = self.linear(h if self.form.router == "h" else before, f"{block}.ffn_gate_inp")
        scores = logits.sigmoid() if self.form.scores == "sigmoid" else logits.softmax(-1)
        bias = f"{block}.exp_probs_b.bias"
        compared = scores + decoded(self.file, bias) if self.has(bias) else scores
        groups = self.key("expert_group_count", 1)
        if groups > 1:
            worth = compared.unflatten(-1, (groups, -1)).topk(2).values.sum(-1)
            kept = torch.zeros_like(worth).scatter(
                -1, worth.topk(self.key("expert_group_used_count")).indices, 1
            )
            compared = compared.masked_fill(
                kept.repeat_interleave(logits.shape[-1] // groups, -1) == 0, float("-inf")
            )
        chosen = compared.topk(self.key("expert_used_count")).indices
        gates = torch.zeros_like(scores).scatter(-1, chosen, scores.gather(-1, chosen))
        if self.key("expert_weights_norm", self.form.normalized):
            gates = gates / gates.sum(-1, keepdim=True)
        gates = gates * self.key("expert_weights_scale", 1.0)
        gate, up, down = (
            decoded(self.file, f"{block}.ffn_{part}_exps.weight") for part in ("gate", "up", "down")
        )
        inner = self.activation(torch.einsum("td,efd->tef", h, gate)) * torch.einsum("td,efd->tef", h, up)
        routed = torch.einsum("tef,edf,te->td", inner, down, gates)
        if self.has(f"{block}.ffn_up.weight") and not self.has(f"{block}.ffn_norm_exps.weight"):
            return (routed + self.gated(h, block, "")) / 2**0.5
        if not self.has(f"{block}.ffn_up_shexp.weight"):
            return routed
        return routed + self.gated(h, block, "_shexp")

    def gated(self, h: torch.Tensor, block: str, suffix: str) -> torch.Tensor:
        up = self.linear(h, f"{block}.ffn_up{suffix}")
        if not self.has(f"{block}.ffn_gate{suffix}.weight"):
            return self.linear(functional.gelu(up, approximate="tanh"), f"{block}.ffn_down{suffix}")
        gate = self.linear(h, f"{block}.ffn_gate{suffix}")
        return self.linear(self.activation(gate) * up, f"{block}.ffn_down{suffix}")

    def activation(self, x: torch.Tensor) -> torch.Tensor:
        if self.form.activation == "gelu":
            return functional.gelu(x, approximate="tanh")
        return functional.relu(x) if self.form.activation == "relu" else functional.silu(x)


def bounded(x: torch.Tensor, bound: float) -> torch.Tensor:
    """Kept between a bound and its negative; 0 for none."""
    return bound * torch.tanh(x / bound) if bound else x
