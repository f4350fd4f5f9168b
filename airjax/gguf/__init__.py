"""GGUF files: metadata, tensor table, mapping, spans. Needs numpy and gguf's constants; never imports jax."""

from gguf.constants import GGMLQuantizationType as GGMLType

from airjax.gguf.describe import describe as describe
from airjax.gguf.describe import format_description as format_description
from airjax.gguf.errors import GGUFError as GGUFError
from airjax.gguf.fingerprint import fingerprint as fingerprint
from airjax.gguf.header import NUMBERS_OF_LAYERS as NUMBERS_OF_LAYERS
from airjax.gguf.header import Metadata as Metadata
from airjax.gguf.header import TensorInfo as TensorInfo
from airjax.gguf.manifest import OF_FIRST_LAYER as OF_FIRST_LAYER
from airjax.gguf.manifest import ExpertSlot as ExpertSlot
from airjax.gguf.manifest import ExpertSpan as ExpertSpan
from airjax.gguf.manifest import Extent as Extent
from airjax.gguf.manifest import Layout as Layout
from airjax.gguf.manifest import Manifest as Manifest
from airjax.gguf.manifest import Slot as Slot
from airjax.gguf.manifest import Span as Span
from airjax.gguf.manifest import build_manifest as build_manifest
from airjax.gguf.manifest import guessing_layers as guessing_layers
from airjax.gguf.manifest import split_experts as split_experts
from airjax.gguf.reader import GGUF as GGUF
from airjax.gguf.reader import open_gguf as open_gguf

__all__ = ["GGMLType"]
