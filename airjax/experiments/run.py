"""Runs a grid: all generations that are not there yet, as many at once as share a sweep."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np
import tqdm

from airjax import __version__, sampling
from airjax.api import Engine
from airjax.engine import Event, Request
from airjax.experiments.grid import Cell, Grid
from airjax.experiments.rows import Journal, Row, row_id
from airjax.gguf import fingerprint

ROWS = "rows.jsonl"
_TOP = 5


@dataclass
class _Generation:
    """A cell that runs."""

    id: str
    cell: Cell
    key: jax.Array
    events: list[Event] = field(default_factory=list)


def run(
    engine: Engine,
    grid: Grid,
    folder: str | os.PathLike[str],
    *,
    accept: Callable[[str], bool] | None = None,
    progress: bool = True,
) -> list[Row]:
    """Runs what is missing of a grid, and gives all of it.

    A row depends on the model, its prompt, its sampler and its seed alone, not on the batch or on what ran before:
    each sequence is decoded in a call of its own, and layers that are streamed cross the link once for all.

    Args:
      engine: loaded with `max_batch`.
      grid: what to run.
      folder: gets `rows.jsonl`, a line for each generation as soon as it ends. Rows that are there are kept.
      accept: a test of each text, for example by a grammar.
      progress: show a bar on stderr.

    Returns:
      The grid's rows, in its order.

    Raises:
      ValueError: the grid cannot run, the engine has no `max_batch`, or the folder's rows are none.
      RuntimeError: a generation failed.
    """
    grid.check()
    asked = _ids(engine, grid)
    with Journal(Path(folder) / ROWS) as journal:
        missing = {name: cell for name, cell in asked.items() if name not in journal.rows}
        if missing:
            bar = tqdm.tqdm(
                total=len(asked), initial=len(asked) - len(missing), unit="row", disable=not progress
            )
            with bar:
                _generate(engine, grid, missing, journal, accept, bar)
        return [journal.rows[name] for name in asked]


def _ids(engine: Engine, grid: Grid) -> dict[str, Cell]:
    """The cells by the ids of their rows."""
    model, config = fingerprint(engine.model.gguf), engine.model.config
    return {
        row_id(
            model=model,
            compute_dtype=config.compute_dtype,
            kv_dtype=config.kv_dtype,
            context=engine.plan.context,
            settings=dict(cell.settings),
            prompt=cell.prompt,
            chat=grid.chat,
            seed=cell.seed,
            max_tokens=grid.max_tokens,
            sampler=cell.sampler,
        ): cell
        for cell in grid.cells()
    }


def _generate(
    engine: Engine,
    grid: Grid,
    missing: dict[str, Cell],
    journal: Journal,
    accept: Callable[[str], bool] | None,
    bar: tqdm.tqdm,
) -> None:
    prompts = {prompt: _encode(engine, grid, prompt) for prompt in grid.prompts}
    model = fingerprint(engine.model.gguf)
    scheduler = engine.scheduler(sampling.standard(), batch_invariant=True)
    with contextlib.closing(scheduler):
        running: dict[int, _Generation] = {}
        waiting = iter(missing.items())
        while True:
            # A few more than run, so that no place in a sweep stays empty.
            while len(running) < 2 * engine.plan.max_batch and (item := next(waiting, None)) is not None:
                name, cell = item
                draw_key, sampler_key = jax.random.split(jax.random.key(cell.seed))
                number = scheduler.submit(
                    Request(
                        ids=tuple(prompts[cell.prompt]),
                        sampler=sampling.standard(**cell.settings, key=sampler_key),  # type: ignore[arg-type]
                        key=draw_key,
                        max_tokens=grid.max_tokens,
                        stop_ids=frozenset(engine.tokenizer.eog_ids),
                        top_logprobs=_TOP,
                    )
                )
                running[number] = _Generation(name, cell, draw_key)
            if not running:
                return
            for event in scheduler.step():
                generation = running[event.request]
                if event.finish_reason == "error":
                    raise RuntimeError(f"sampler {generation.cell.sampler!r} failed: {event.error}")
                generation.events.append(event)
                if event.finish_reason:
                    journal.append(_row(engine, model, running.pop(event.request), accept))
                    bar.update()


def _encode(engine: Engine, grid: Grid, prompt: str) -> list[int]:
    if grid.chat:
        return engine.apply_chat_template([{"role": "user", "content": prompt}])
    return engine.tokenizer.encode(prompt)


def _row(engine: Engine, model: str, generation: _Generation, accept: Callable[[str], bool] | None) -> Row:
    cell, events = generation.cell, generation.events
    drawn = [(event.token, event) for event in events if event.token is not None]
    ids = [token for token, _ in drawn]
    shown = ids[:-1] if events[-1].finish_reason == "stop" else ids
    text = engine.tokenizer.decode(shown)
    return Row(
        id=generation.id,
        model=model,
        versions={"airjax": __version__, "jax": jax.__version__, "python": platform.python_version()},
        sampler=cell.sampler,
        settings=dict(cell.settings),
        prompt=cell.prompt,
        seed=cell.seed,
        key=np.asarray(jax.random.key_data(generation.key)).tolist(),
        ids=ids,
        text=text,
        finish_reason=events[-1].finish_reason,
        logprobs=[event.logprob for _, event in drawn],
        entropies=[event.entropy or 0.0 for _, event in drawn],
        top=[[logprob for _, logprob in event.top] for _, event in drawn],
        accepted=None if accept is None else accept(text),
    )
