"""Ceilings kept in a file, so that a machine is probed once."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from airjax.predict import Ceilings


def load_ceilings(path: Path, identity: Mapping[str, str], disk: str) -> Ceilings | None:
    """The ceilings of this machine, if they were measured before.

    Args:
      path: the file.
      identity: of this machine, from `machine.identity`; measurements of another one don't count.
      disk: of the model's file, from `machine.disk_of`; the rate of another disk is left out.

    Returns:
      The ceilings; None where there is no file, a broken one, or one of another machine or other versions.
    """
    kept = _read(path)
    if kept is None or kept["identity"] != dict(identity):
        return None
    try:
        ceilings = Ceilings(**kept["ceilings"])
        alone = tuple(float(rate) for rate in ceilings.links_alone_bytes_per_s)
    except (TypeError, ValueError):
        return None
    return dataclasses.replace(
        ceilings, disk_bytes_per_s=kept["disks"].get(disk), links_alone_bytes_per_s=alone
    )


def save_ceilings(path: Path, identity: Mapping[str, str], disk: str, ceilings: Ceilings) -> None:
    """Keeps measured ceilings; what the file holds of the same machine's other disks stays.

    Raises:
      OSError: the file can't be written.
    """
    kept = _read(path)
    disks = kept["disks"] if kept is not None and kept["identity"] == dict(identity) else {}
    content = {
        "identity": dict(identity),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "ceilings": dataclasses.asdict(ceilings),
        "disks": {**disks, disk: ceilings.disk_bytes_per_s},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    # Written whole or not at all: two runs may end at once.
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    part.replace(path)


def _read(path: Path) -> dict[str, Any] | None:
    with contextlib.suppress(OSError, ValueError):
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and {"identity", "ceilings", "disks"} <= content.keys():
            return content
    return None
