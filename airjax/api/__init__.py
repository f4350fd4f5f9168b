"""The engine's front: text in, text out. Notebooks, server and launcher all stand on it."""

from airjax.api.front import Engine as Engine
from airjax.api.front import RequestError as RequestError
from airjax.api.front import Token as Token
from airjax.api.opening import ComputeDtype as ComputeDtype
from airjax.api.opening import KVDtype as KVDtype
from airjax.api.opening import choose_devices as choose_devices
from airjax.api.opening import load as load
from airjax.engine.memory import free_device_bytes as free_device_bytes
from airjax.engine.memory import free_host_bytes as free_host_bytes
