"""Composable, pure samplers: transforms of logits, `chain`, and the draw of a token."""

from airjax.sampling.draw import draw, log_prob
from airjax.sampling.mask import mask_tokens
from airjax.sampling.penalties import repetition_penalty
from airjax.sampling.temperature import greedy, temperature
from airjax.sampling.transform import Apply, State, Transform, chain
from airjax.sampling.truncation import min_p, top_k, top_p

__all__ = [
    "Apply",
    "State",
    "Transform",
    "chain",
    "draw",
    "greedy",
    "log_prob",
    "mask_tokens",
    "min_p",
    "repetition_penalty",
    "temperature",
    "top_k",
    "top_p",
]
