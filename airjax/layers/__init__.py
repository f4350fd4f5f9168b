"""Pure functions that architectures are made of; none of them knows a weight format."""

from airjax.layers.attention import SCORES_BYTES as SCORES_BYTES
from airjax.layers.attention import AttentionForm as AttentionForm
from airjax.layers.attention import attention_weights as attention_weights
from airjax.layers.attention import read_rows as read_rows
from airjax.layers.mlp import Activation as Activation
from airjax.layers.mlp import gated as gated
from airjax.layers.moe import Grouping as Grouping
from airjax.layers.moe import Routing as Routing
from airjax.layers.moe import choose as choose
from airjax.layers.moe import group_by_expert as group_by_expert
from airjax.layers.moe import most_blocks as most_blocks
from airjax.layers.norms import rms_norm as rms_norm
from airjax.layers.online import Partial as Partial
from airjax.layers.online import attend_part as attend_part
from airjax.layers.online import finish as finish
from airjax.layers.online import merge as merge
from airjax.layers.paged import attention as attention
from airjax.layers.paged import write_rows as write_rows
from airjax.layers.rope import rope as rope
from airjax.layers.rope import rope_frequencies as rope_frequencies
from airjax.layers.rope import yarn_frequencies as yarn_frequencies
from airjax.layers.rows import KV_DTYPES as KV_DTYPES
from airjax.layers.rows import empty_cache as empty_cache
from airjax.layers.rows import encode as encode
from airjax.layers.rows import row_bytes as row_bytes
from airjax.layers.rows import rows_struct as rows_struct
