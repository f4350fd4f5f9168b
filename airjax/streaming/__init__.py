"""Bytes on their way to the device and back: the ring, the tiers that feed it, the KV shuttle, the timeline.

Knows byte ranges and arrays; knows neither GGUF nor models.
"""

from airjax.streaming.devicepool import DevicePool as DevicePool
from airjax.streaming.held import Form as Form
from airjax.streaming.held import Held as Held
from airjax.streaming.held import Sources as Sources
from airjax.streaming.held import assign as assign
from airjax.streaming.held import begin_step as begin_step
from airjax.streaming.held import empty as empty
from airjax.streaming.held import fetch as fetch
from airjax.streaming.held import view_of as view_of
from airjax.streaming.links import Links as Links
from airjax.streaming.pinned import PinnedMemory as PinnedMemory
from airjax.streaming.pinned import PinningError as PinningError
from airjax.streaming.pinned import cuda_driver as cuda_driver
from airjax.streaming.policy import LFU as LFU
from airjax.streaming.policy import LRU as LRU
from airjax.streaming.policy import Policy as Policy
from airjax.streaming.pool import CALL_BYTES as CALL_BYTES
from airjax.streaming.pool import STAGED_BYTES as STAGED_BYTES
from airjax.streaming.pool import Pool as Pool
from airjax.streaming.pool import PoolStats as PoolStats
from airjax.streaming.pool import Shape as Shape
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
from airjax.streaming.turns import Turns as Turns
from airjax.streaming.units import MappedUnits as MappedUnits
from airjax.streaming.units import ReadUnits as ReadUnits
from airjax.streaming.units import Stack as Stack
from airjax.streaming.units import UnitSource as UnitSource
