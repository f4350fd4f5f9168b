"""Pure functions that architectures are made of; none of them knows a weight format."""

from airjax.layers.attention import SCORES_BYTES as SCORES_BYTES
from airjax.layers.attention import read_rows as read_rows
from airjax.layers.mlp import gated as gated
from airjax.layers.norms import rms_norm as rms_norm
from airjax.layers.paged import attention as attention
from airjax.layers.paged import write_rows as write_rows
from airjax.layers.rope import rope as rope
from airjax.layers.rope import rope_frequencies as rope_frequencies
