"""The rows of an experiment: JSON lines that are only ever appended, so that a killed run goes on where it was."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from airjax.experiments import metrics


@dataclass(frozen=True)
class Row:
    """One generation.

    Attributes:
      id: of what was asked; see `row_id`.
      model: fingerprint of the file.
      versions: of airjax, jax and Python.
      sampler, settings, prompt, seed: of the cell.
      key: the words of the key that drew, before it was folded with each draw's number.
      ids, text: what was generated; the end-of-generation token is among the ids only.
      finish_reason: as the engine has it.
      logprobs: of each token under the model itself, in nats.
      entropies: of each distribution, in nats.
      top: log-probabilities of the most probable tokens at each place.
      accepted: by the experiment's test; None without one.
    """

    id: str
    model: str
    versions: Mapping[str, str]
    sampler: str
    settings: Mapping[str, float]
    prompt: str
    seed: int
    key: Sequence[int]
    ids: Sequence[int]
    text: str
    finish_reason: str
    logprobs: Sequence[float]
    entropies: Sequence[float]
    top: Sequence[Sequence[float]]
    accepted: bool | None = None

    def metrics(self) -> dict[str, float | None]:
        """Numbers of this text alone."""
        return {
            "length": len(self.ids),
            "perplexity": metrics.perplexity(self.logprobs),
            "entropy": metrics.mean(self.entropies),
            "distinct_1": metrics.distinct([self.ids], 1),
            "distinct_2": metrics.distinct([self.ids], 2),
            "distinct_3": metrics.distinct([self.ids], 3),
            "repetition": metrics.repetition(self.ids),
        }


def row_id(**asked: Any) -> str:
    """16 hexadecimal digits of what was asked for: model, sampler, prompt, seed, length."""
    text = json.dumps(asked, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def read_rows(path: str | os.PathLike[str]) -> list[Row]:
    """The rows of a file in the order in which they were finished; a last line that was cut off does not count.

    Raises:
      ValueError: another line is no row.
      OSError: the file cannot be read.
    """
    return _parse(Path(path), Path(path).read_bytes())[0]


class Journal:
    """A file of rows to append to; a context manager.

    Attributes:
      rows: those that were there, by id.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        data = path.read_bytes() if path.exists() else b""
        rows, whole = _parse(path, data)
        self.rows = {row.id: row for row in rows}
        self._file = open(path, "ab")  # noqa: SIM115 closed by `__exit__`
        if whole < len(data):  # the run before was killed while it wrote
            self._file.truncate(whole)

    def append(self, row: Row) -> None:
        """Writes a row, which is on the disk afterwards."""
        line = dataclasses.asdict(row) | {"metrics": row.metrics()}
        self._file.write(json.dumps(line, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.rows[row.id] = row

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _parse(path: Path, data: bytes) -> tuple[list[Row], int]:
    """The rows of whole lines, and how many bytes these are."""
    whole = data.rfind(b"\n") + 1
    names = [field.name for field in dataclasses.fields(Row)]
    rows = []
    for number, line in enumerate(data[:whole].splitlines(), 1):
        try:
            values = json.loads(line)
            rows.append(Row(**{name: values[name] for name in names}))
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{path}: line {number} is no row of an experiment: remove it, or write to another folder"
            ) from None
    return rows, whole
