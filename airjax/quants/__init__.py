"""Block formats of GGUF files, decoded inside jit, and products with them."""

from airjax.quants.dense import decoded_tiles as decoded_tiles
from airjax.quants.experts import Stacked as Stacked
from airjax.quants.experts import halves as halves
from airjax.quants.experts import matmul_blocks as matmul_blocks
from airjax.quants.experts import matmul_each as matmul_each
from airjax.quants.experts import stacked as stacked
from airjax.quants.kernels import MOST_ROWS as MOST_ROWS
from airjax.quants.matmul import matmul as matmul
from airjax.quants.matmul import matmul_combined as matmul_combined
from airjax.quants.matmul import matmul_many as matmul_many
from airjax.quants.mixture import mixture_products as mixture_products
from airjax.quants.mixture import takes as takes
from airjax.quants.packed import PackedTensor as PackedTensor
from airjax.quants.packed import TakenRows as TakenRows
from airjax.quants.packed import pack as pack
from airjax.quants.packed import packable as packable
from airjax.quants.packed import packed_bytes as packed_bytes
from airjax.quants.packed import take_rows as take_rows
from airjax.quants.qtensor import QTensor as QTensor
from airjax.quants.qtensor import dequantize as dequantize
from airjax.quants.qtensor import row_bytes as row_bytes
from airjax.quants.qtensor import supported as supported
from airjax.quants.qtensor import view as view
from airjax.quants.selftest import decoding_usable as decoding_usable
from airjax.quants.selftest import mixture_usable as mixture_usable
from airjax.quants.selftest import usable as usable
