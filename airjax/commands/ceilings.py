"""The machine's ceilings in the user's cache folder, and what a run should reach by them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jax

    from airjax.api import Engine
    from airjax.predict import Ceilings, Prediction
    from airjax.streaming import Links


def user_cache_dir() -> Path:
    """Where airjax keeps what it can make again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "airjax"


def cached_ceilings(device: jax.Device, model: str) -> Ceilings | None:
    """The ceilings of this machine; None until `airjax bench` or `airjax plan --probe` has measured them.

    Args:
      device: where the blocks run.
      model: the file, which tells the disk.
    """
    from airjax import bench

    return bench.load_ceilings(_path(), bench.identity(device), bench.disk_of(model))


def cached_links(devices: Sequence[jax.Device], model: str) -> Links | None:
    """What the links of exactly so many devices can do, if that was measured."""
    ceilings = cached_ceilings(devices[0], model) if len(devices) > 1 else None
    links = None if ceilings is None else ceilings.links
    return links if links is not None and len(links.alone) == len(devices) else None


def probe_ceilings(
    device: jax.Device, model: str, memory_bytes: int = 1 << 30, devices: Sequence[jax.Device] = ()
) -> Ceilings:
    """Measures the ceilings and keeps them.

    Args:
      device: where the blocks run.
      model: the file, read for the disk's rate.
      memory_bytes: device memory that the probes may take.
      devices: several, whose links are measured too.
    """
    from airjax import bench

    ceilings = bench.probe(device, model, memory_bytes=memory_bytes, devices=devices)
    bench.save_ceilings(_path(), bench.identity(device), bench.disk_of(model), ceilings)
    return ceilings


def predict_run(engine: Engine) -> Prediction | None:
    """What the engine's last run should have reached; None where the ceilings are not known, or nothing ran."""
    from airjax.predict import predict

    if not engine.stats.prompt_tokens:
        return None
    model = engine.model
    ceilings = cached_ceilings(model.device, str(model.gguf.path))
    if ceilings is None:
        return None
    return predict(model.plan, model.config, ceilings, 1, engine.stats.prompt_tokens)


def _path() -> Path:
    # Beside the compiled programs, whose folder is deleted as a whole without harm.
    return user_cache_dir() / "ceilings.json"
