"""Bytes on their way to the device and back: the ring, the tiers that feed it, the KV shuttle, the timeline.

Knows byte ranges and arrays; knows neither GGUF nor models.
"""

from airjax.streaming.pinned import PinnedMemory as PinnedMemory
from airjax.streaming.pinned import PinningError as PinningError
from airjax.streaming.pinned import cuda_driver as cuda_driver
from airjax.streaming.readers import ByteRange as ByteRange
from airjax.streaming.readers import ReadError as ReadError
from airjax.streaming.readers import RingReader as RingReader
from airjax.streaming.ring import Ring as Ring
from airjax.streaming.ring import Source as Source
from airjax.streaming.shuttle import Shuttle as Shuttle
from airjax.streaming.shuttle import piece_struct as piece_struct
from airjax.streaming.shuttle import to_cache as to_cache
from airjax.streaming.sources import MappedSource as MappedSource
from airjax.streaming.sources import ReadSource as ReadSource
from airjax.streaming.timeline import Timeline as Timeline
