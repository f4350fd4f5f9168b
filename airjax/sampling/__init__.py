"""Composable, pure samplers: transforms of logits, `chain`, and the draw of a token."""

from airjax.sampling.adaptive import adaptive_p
from airjax.sampling.alone import only_temperature
from airjax.sampling.bias import banned_tokens, forced_tokens, logit_bias, min_new_tokens
from airjax.sampling.culprit import DrawError, explain
from airjax.sampling.draw import draw, log_prob
from airjax.sampling.dry import dry
from airjax.sampling.mask import mask_tokens
from airjax.sampling.mirostat import mirostat
from airjax.sampling.ngram import no_repeat_ngram
from airjax.sampling.other import Other, contrastive, guidance, put_other
from airjax.sampling.penalties import output_penalties, penalties, repetition_penalty
from airjax.sampling.standard import standard
from airjax.sampling.temperature import dynamic_temperature, greedy, scale, temperature
from airjax.sampling.transform import Apply, State, Transform, chain
from airjax.sampling.truncation import min_p, top_k, top_p
from airjax.sampling.typical import epsilon_cutoff, eta_cutoff, top_n_sigma, typical_p
from airjax.sampling.watermark import Detection, detect_watermark, watermark
from airjax.sampling.within import within_top_k
from airjax.sampling.xtc import xtc

__all__ = [
    "Apply",
    "Detection",
    "DrawError",
    "Other",
    "State",
    "Transform",
    "adaptive_p",
    "banned_tokens",
    "chain",
    "contrastive",
    "detect_watermark",
    "draw",
    "dry",
    "dynamic_temperature",
    "epsilon_cutoff",
    "eta_cutoff",
    "explain",
    "forced_tokens",
    "greedy",
    "guidance",
    "log_prob",
    "logit_bias",
    "mask_tokens",
    "min_new_tokens",
    "min_p",
    "mirostat",
    "no_repeat_ngram",
    "only_temperature",
    "output_penalties",
    "penalties",
    "put_other",
    "repetition_penalty",
    "scale",
    "standard",
    "temperature",
    "top_k",
    "top_n_sigma",
    "top_p",
    "typical_p",
    "watermark",
    "within_top_k",
    "xtc",
]
