"""Continuous batching: requests join and leave between sweeps, and every sweep carries all of them.

Yu et al., Orca: A Distributed Serving System for Transformer-Based Generative Models, 2022.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from airjax.engine.batch import (
    Group,
    PagedState,
    new_pages,
    place,
    read_pages,
    shared_sweep,
    table_of,
    take_pages,
    write_pages,
)
from airjax.engine.drafting.batch import BatchDrafts, still_right
from airjax.engine.drafting.guarded import warn
from airjax.engine.drafting.rows import padded
from airjax.engine.drafting.shared import SharedModel
from airjax.engine.drafting.smaller import Vocabulary
from airjax.engine.draws import Draws
from airjax.engine.generation import padded_rows
from airjax.engine.model import Model
from airjax.engine.pages import Pages
from airjax.engine.request import MAX_TOP_LOGPROBS, Constraint, Event, Finish, Request
from airjax.engine.sequence import BatchSequence, BatchStats, Flight, Kept, Rows
from airjax.engine.stats import peak_device_bytes
from airjax.engine.step import last_rows, next_rows, sum_step
from airjax.plan import KV_PAGE
from airjax.sampling import Transform
from airjax.types import Array

# The pool grows from this many pages, so that memory follows what is used.
_FIRST_PAGES = 64


class Scheduler:
    """Runs requests in shared sweeps. It belongs to one thread.

    A request's tokens depend on its prompt, key and settings alone: to the rounding of products and sums whose
    order the number of rows decides, and bit for bit with `batch_invariant`.

    Args:
      model: an open model whose plan has `max_batch` sequences.
      sampler: a transform of the structure that all requests will have.
      batch_invariant: decode each sequence in a call of its own. Weights still cross the link once for all.
      draft_max: tokens that may be guessed for a sequence and checked in one sweep; 0 for none, and none where
        `batch_invariant`, since the rows of a draft share a call.
      draft_model: guesses beside lookup: open for as many sequences, and what translates its tokens, None if nothing
        has to; it stays open.
      first_pages: pages of the KV cache to begin with; each time that there are more, programs are compiled anew. None
        for few, and at most as many as the plan allows.

    Attributes:
      stats: what was measured.
    """

    def __init__(
        self,
        model: Model,
        *,
        sampler: Transform,
        batch_invariant: bool = False,
        draft_max: int = 0,
        draft_model: tuple[Model, Vocabulary | None] | None = None,
        first_pages: int | None = None,
    ) -> None:
        plan = model.plan
        self.model = model
        self.stats = BatchStats()
        self.max_batch = plan.max_batch
        self._rows_per_call = 1 if batch_invariant else self.max_batch
        self._sampler = sampler
        self._first_pages = first_pages
        self._mask_words = -(-model.config.vocab_size // 32)
        self._open_state()
        self._slots = list(range(self.max_batch - 1, -1, -1))
        self._waiting: list[BatchSequence] = []
        self._running: list[BatchSequence] = []
        self._numbers = itertools.count()
        self._flight: Flight | None = None
        self._drafts: BatchDrafts | None = None
        if draft_max and not batch_invariant:
            shared = None if draft_model is None else SharedModel(*draft_model, self.rows_of)
            self._drafts = BatchDrafts(model, draft_max, shared)
        self._masks = ThreadPoolExecutor(1, thread_name_prefix="airjax-masks")

    @property
    def busy(self) -> bool:
        """Whether a step would do something."""
        return bool(self._waiting or self._running)

    @property
    def running(self) -> int:
        """Sequences that take part in sweeps."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Sequences that wait for a place."""
        return len(self._waiting)

    @property
    def pages_held(self) -> int:
        """Pages of the KV cache that sequences hold."""
        return self._pages.held

    @property
    def pages_limit(self) -> int:
        """Pages of the KV cache that there may be."""
        return self._pages.limit

    def submit(self, request: Request) -> int:
        """Puts a request in the queue.

        Returns:
          Its number.

        Raises:
          ValueError: it cannot be run.
        """
        self.check(request)
        sequence = BatchSequence(next(self._numbers), request, list(request.ids))
        self._waiting.append(sequence)
        return sequence.number

    def cancel(self, number: int) -> None:
        """Drops a request, wherever it is; one that has ended already is no error."""
        for queue in (self._waiting, self._running):
            for sequence in [sequence for sequence in queue if sequence.number == number]:
                self._leave(sequence)

    def cached_tokens(self, number: int) -> int:
        """How many tokens of a request's prompt came from shared pages; 0 once it has ended."""
        return next((s.cached for s in (*self._running, *self._waiting) if s.number == number), 0)

    def step(self) -> list[Event]:
        """Runs one sweep: a token for every decoding sequence, and a chunk of the prompts that are not in yet.

        Returns:
          What happened, in the order of the requests. An error that hits the whole sweep ends the requests that
          took part in it, and the scheduler stays usable.
        """
        start = time.perf_counter()
        events: list[Event] = []
        flight, self._flight = self._flight, None
        batch: Sequence[BatchSequence] = flight.sequences if flight is not None else ()
        try:
            if flight is not None and any(sequence.slot >= 0 for sequence in batch):
                if self._drafts is not None:
                    self._drafts.propose(())
                events += self._land(flight)
            else:
                events += self._admit()
                events += self._draft()
                batch = self._choose()
                if batch:
                    events += self._sweep(batch)
        except Exception as error:
            failed = [sequence for sequence in batch if sequence.slot >= 0]
            if not batch:  # somebody has to go, or the same would happen for ever
                failed = self._running[:] or self._waiting[:1]
            events += [self._fail(sequence, f"the sweep failed: {error}") for sequence in failed]
            self._start_over()
        # What is in flight may still be at work.
        self.model.count_fetched(keep=int(self._flight is not None))
        self._count()
        self.stats.busy_s += time.perf_counter() - start
        return events

    def rows_of(self, count: int, width: int = 1) -> int:
        """Rows of the call that takes `width` tokens of `count` sequences: few distinct numbers, so few programs.

        On a CPU a row more costs as much as the first; a GPU's kernels hardly notice up to 8, and little up to 32, of
        decoding sequences. Prompts keep it busy.
        """
        if width > 1 or self.model.device.platform == "cpu":
            return 1 << (count - 1).bit_length()
        rows = 1
        while rows < count:
            rows *= 8 if rows < 8 else 4
        return rows

    @property
    def lanes(self) -> list[Scheduler]:
        """The schedulers that there are: this one."""
        return [self]

    def between(self) -> contextlib.AbstractContextManager[None]:
        """Between two steps: whenever its one thread is not in one."""
        return contextlib.nullcontext()

    def close(self) -> None:
        """Drops all requests and frees the cache."""
        for sequence in (*self._waiting, *self._running):
            self._leave(sequence)
        self._masks.shutdown()
        if self._drafts is not None:
            self._drafts.close()
        self.model.wait()
        self._state.close()

    def _open_state(self) -> None:
        """Empty pages, and rows of the sampler's state."""
        limit = self.model.plan.kv_tokens // KV_PAGE
        # As with the cache of one sequence, see `new_state`.
        first = _FIRST_PAGES if self._first_pages is None else self._first_pages
        self._pages = Pages(limit if self.model.takes_caches_whole else min(first, limit), limit)
        self._state: PagedState = new_pages(self.model, self._pages.count)
        self._draws = Draws(self.model, self._sampler, self.max_batch)

    def check(self, request: Request) -> None:
        """Refuses a request that cannot be run.

        Raises:
          ValueError: it says why.
        """
        config, context = self.model.config, self.model.plan.context
        if not request.ids:
            raise ValueError("the prompt is empty: give at least one token")
        if len(request.ids) >= context:
            raise ValueError(
                f"the prompt has {len(request.ids)} tokens but the context holds {context}: "
                "shorten it or raise --context"
            )
        outside = [token for token in request.ids if not 0 <= token < config.vocab_size]
        if outside:
            raise ValueError(f"token ids must be between 0 and {config.vocab_size - 1}, got {outside[0]}")
        if request.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {request.max_tokens}")
        if not 0 <= request.top_logprobs <= MAX_TOP_LOGPROBS:
            raise ValueError(
                f"top_logprobs must be between 0 and {MAX_TOP_LOGPROBS}, got {request.top_logprobs}"
            )
        if not self._draws.suits(request):
            raise ValueError("the sampler must have the structure that this scheduler was made with")

    def _admit(self) -> list[Event]:
        """Takes waiting sequences in, the oldest first, while there is a row and room for their prompt.

        Returns:
          The ends of those that could not be taken in, such as by a sampler that does not fit the model.
        """
        failures: list[Event] = []
        while self._waiting and self._slots:
            sequence = self._waiting[0]
            # What is shared is not computed again, so a mean could not be taken over it.
            if sequence.kept is None and not sequence.request.pooled:
                sequence.pages = self._pages.share(sequence.ids)
                sequence.filled = sequence.cached = len(sequence.pages) * KV_PAGE
            needed = _pages_for(len(sequence.ids)) - len(sequence.pages)
            if self._pages.room < needed and self._running:
                self._pages.release(sequence.pages)
                sequence.pages = []
                break
            del self._waiting[0]
            sequence.slot = self._slots.pop()
            bisect.insort(self._running, sequence, key=lambda s: s.number)
            try:
                self._bring_in(sequence)
            except Exception as error:
                failures.append(self._fail(sequence, str(error)))
                if not isinstance(error, ValueError):  # pages or rows may be gone
                    self._start_over()
        return failures

    def _draft(self) -> list[Event]:
        """Asks for guesses for those that decode. Whatever fails there, they go on.

        Returns:
          The ends of those whose constraint failed.
        """
        if self._drafts is None:
            return []
        decoding = [sequence for sequence in self._running if sequence.decodes]
        try:
            broken = self._drafts.propose(decoding, self._draws)
        except Exception as error:
            warn("this batch", error)
            drafts, self._drafts = self._drafts, None
            for sequence in decoding:
                sequence.draft = ()
            with contextlib.suppress(Exception):
                drafts.close()
            return []
        return [
            self._fail(sequence, f"the constraint failed: {broken[sequence.number]}")
            for sequence in decoding
            if sequence.number in broken
        ]

    def _bring_in(self, sequence: BatchSequence) -> None:
        """Gives an admitted sequence its row of the sampler's state, and a preempted one its cache again."""
        request = sequence.request
        if sequence.kept is None:
            row = self._draws.first_row(request, sequence.ids)
            self.stats.prompt_tokens += len(sequence.ids)
            self.stats.cached_tokens += sequence.cached
        else:
            row = sequence.kept.row
            count = _pages_for(sequence.filled)
            pages = take_pages(self._pages, self._state, count)
            assert pages is not None  # its room was looked at before it was admitted
            sequence.pages = pages
            write_pages(self._state, pages, sequence.kept.content)
            sequence.kept = None
        self._draws.put(sequence.slot, row, request.key)

    def _choose(self) -> list[BatchSequence]:
        """Who takes part in this sweep: all that decode, and prompts up to a chunk of rows; each gets its pages."""
        chunk = self.model.plan.prefill_chunk
        left = chunk
        batch: list[BatchSequence] = []
        for sequence in list(self._running):
            if sequence.slot < 0:  # was preempted a moment ago
                continue
            if not sequence.decodes:
                rows = self._width(sequence)
                if rows > left and left < chunk:
                    continue
                left -= rows
            # A draft sends nobody away.
            if sequence.draft and not self._has_pages(sequence, len(sequence.ids) + len(sequence.draft)):
                sequence.draft = ()
            new = 1 + len(sequence.draft) if sequence.decodes else min(sequence.pending, chunk)
            if self._make_room(sequence, _pages_for(sequence.filled + new)):
                batch.append(sequence)
        return [sequence for sequence in batch if sequence.slot >= 0]

    def _make_room(self, sequence: BatchSequence, count: int) -> bool:
        """Gives a sequence `count` pages in all, from younger ones if need be; False if it was itself sent away."""
        while (missing := count - len(sequence.pages)) > 0:
            pages = take_pages(self._pages, self._state, missing)
            if pages is not None:
                sequence.pages += pages
                return True
            youngest = self._running[-1]
            self._preempt(youngest)
            if youngest is sequence:
                return False
        return True

    def _preempt(self, sequence: BatchSequence) -> None:
        """Sends a sequence back to the queue with its cache on the host, so that it goes on as if never gone."""
        self.stats.preemptions += 1
        used = sequence.pages[: _pages_for(sequence.filled)]
        content = read_pages(self._state, used) if used else []
        sequence.kept = Kept(content, self._draws.row(sequence.slot))
        self._leave(sequence)
        bisect.insort(self._waiting, sequence, key=lambda s: s.number)

    def _leave(self, sequence: BatchSequence) -> None:
        """Takes a sequence out of its queue and frees what it holds."""
        for queue in (self._waiting, self._running):
            if sequence in queue:
                queue.remove(sequence)
        if sequence.slot >= 0:
            self._slots.append(sequence.slot)
            sequence.slot = -1
            if self._drafts is not None:
                self._drafts.forget(sequence.number)
        self._pages.release(sequence.pages)
        sequence.pages, sequence.draft = [], ()

    def _sweep(self, batch: Sequence[BatchSequence]) -> list[Event]:
        start, waited, before = time.perf_counter(), self.model.stats.wait_s, len(batch)
        drafted = [sequence for sequence in batch if sequence.draft]
        masks = {
            sequence.number: self._masks.submit(_mask, sequence.request.constraint)
            for sequence in batch
            if sequence.request.constraint is not None and not sequence.draft
        }
        members = [*_split([s for s in batch if s.decodes and not s.draft], self._rows_per_call)]
        prompts = self._prompts([s for s in batch if not s.decodes])
        members += prompts
        groups = [self._group(group, self._width(group[0])) for group in members]
        # What the draws need goes up now: after the sweep it would wait behind the layers fetched for the next one.
        rows = [self._rows(group, sequences) for group, sequences in zip(groups, members, strict=True)]
        checks: list[Rows] = []
        if drafted:
            before += sum(len(sequence.draft) for sequence in drafted)
            width = padded(1 + max(len(sequence.draft) for sequence in drafted))
            groups.append(self._group(drafted, width))
            checks = self._checks(len(groups[-1].ids), drafted)
        placed = place(self.model, groups)
        alone = len(groups) == 1 and not masks and not drafted
        lands = alone and all(
            _comes_in(s, groups[0].positions[row]) and not s.request.pooled
            for row, s in enumerate(members[0])
        )
        flights: list[Flight] = []

        def fly(xs: list[Array]) -> None:
            x, own = self._last(xs[0], rows[0])
            group, on_device = self._decoding(groups[0], placed[-1][0], len(x))
            flights.append(self._fly(list(members[0]), group, on_device, x, own))

        xs = shared_sweep(self.model, groups, self._state, placed, fly if lands else None)
        for group, sequences in zip(groups, members, strict=False):
            for row, sequence in enumerate(sequences):
                self._fill(sequence, int((group.positions[row] >= 0).sum()))
        for sequence in drafted:
            self._fill(sequence, 1)
        events = self._pool(members, xs, placed[-1])
        if flights:
            events += self._land(flights[0])
        else:
            for x, sequences, arguments in zip(xs, members, rows, strict=False):
                finished = [(row, s) for row, s in enumerate(sequences) if s.pending == 0 and s.slot >= 0]
                if finished:
                    x, arguments = self._last(x, arguments)
                    events += self._draw(x, finished, arguments, masks)
            if drafted:
                events += self._check_drafts(xs[-1], drafted, checks)
        if self._drafts is not None and not prompts:
            program = tuple((group.ids.shape, group.table.shape) for group in groups)
            seconds = time.perf_counter() - start
            self._drafts.observe(before, seconds, self.model.stats.wait_s - waited, program)
        return sorted(events, key=lambda event: event.request)

    def _pool(
        self,
        members: Sequence[Sequence[BatchSequence]],
        xs: Sequence[Array],
        placed: Sequence[tuple[Array, Array]],
    ) -> list[Event]:
        """Adds to the means of pooled requests; those whose prompt is in are done and leave."""
        events = []
        for sequences, x, (positions, _) in zip(members, xs, placed, strict=False):
            pooled = [(row, s) for row, s in enumerate(sequences) if s.request.pooled]
            if not pooled:
                continue
            add = sum_step(self.model.layouts, self.model.config)
            sums = np.asarray(add(self.model.globals, x, positions))
            for row, sequence in pooled:
                sequence.total = sequence.total + sums[row].astype(np.float64)
                if sequence.pending == 0:
                    mean = np.asarray(sequence.total / len(sequence.ids), np.float32)
                    events.append(Event(sequence.number, None, 0.0, (), "stop", hidden=mean))
                    self._leave(sequence)
        return events

    def _fill(self, sequence: BatchSequence, count: int) -> None:
        """Takes note that the next `count` tokens of a sequence are in the cache."""
        full = sequence.filled // KV_PAGE
        sequence.filled += count
        if sequence.filled // KV_PAGE > full:
            self._pages.publish(sequence.pages, sequence.ids[: sequence.filled])

    def _checks(self, rows: int, sequences: Sequence[BatchSequence]) -> list[Rows]:
        """What the draws after the certain token take, then those after each token of the drafts."""
        checks = []
        for at in range(1 + max(len(sequence.draft) for sequence in sequences)):
            slots = np.full(rows, self._draws.spare, np.int32)
            tokens, counts = np.full(rows, -1, np.int32), np.zeros(rows, np.int32)
            for row, sequence in enumerate(sequences):
                if at <= len(sequence.draft):
                    slots[row], counts[row] = sequence.slot, sequence.drawn + at
                    tokens[row] = sequence.draft[at - 1] if at else sequence.ids[-1]
            checks.append((np.full(rows, at, np.int32), slots, tokens, counts))
        return [Rows(*each) for each in self.model.put(checks)]

    def _check_drafts(
        self, x: Array, sequences: Sequence[BatchSequence], checks: Sequence[Rows]
    ) -> list[Event]:
        """Draws after the certain token of each sequence, and goes on while the draws are its draft's tokens."""
        assert self._drafts is not None
        events: list[Event] = []
        masks = {s.number: s.masks for s in sequences if s.masks is not None}
        self.stats.drafted_tokens += sum(len(sequence.draft) for sequence in sequences)
        rows = checks[0]
        for at in range(len(checks)):
            right = [(row, s) for row, s in enumerate(sequences) if s.slot >= 0 and s.pending == 0]
            if not right:
                break
            allowed = None
            if masks:
                allowed = np.full((len(rows.slots), self._mask_words), np.uint32(0xFFFFFFFF))
                for row, sequence in right:
                    if sequence.number in masks:
                        allowed[row] = masks[sequence.number][at]
            out = self._launch(x, rows, [sequence for _, sequence in right], allowed)
            accepted = sum(sequence.accepted for _, sequence in right)
            events += self._read(x, right, rows, out, {}, allowed)
            self.stats.accepted_tokens += sum(sequence.accepted for _, sequence in right) - accepted
            if at + 1 < len(checks):
                later = checks[at + 1]
                slots = still_right(
                    later.slots, rows.slots, out[0], later.tokens, np.int32(self._draws.spare)
                )
                rows = later._replace(slots=slots)
        return events

    def _land(self, flight: Flight) -> list[Event]:
        """Reads the draws of a sweep; before that the device is given the next one where nothing speaks against it."""
        ahead = self._ahead(flight) if self._may_go_ahead(flight) else None
        here = [(row, s) for row, s in enumerate(flight.sequences) if s.slot >= 0]
        events = self._read(flight.x, here, flight.rows, flight.out, {}, None)
        if ahead is not None:
            staying = [sequence for _, sequence in here if sequence.slot >= 0]
            for sequence in staying:
                if sequence.filled % KV_PAGE == 0:
                    self._pages.publish(sequence.pages, sequence.ids[: sequence.filled])
            self._flight = ahead if staying else None
        return sorted(events, key=lambda event: event.request)

    def _may_go_ahead(self, flight: Flight) -> bool:
        """Whether the next sweep is that of the same sequences whatever they draw, but for a stop token.

        Not where the link is waited for: its next layers are under way anyhow. Nor in a pipeline, where each device
        works in the order in which it was asked: two sweeps of one batch, one after the other, keep those of the other
        batches waiting. A sequence that then draws a stop token has a row in one sweep too many, which writes behind
        what it leaves.
        """
        plan = self.model.plan
        if not self.model.runs_ahead or self.model.stages:
            return False
        if self._drafts is not None and not self._drafts.asleep:
            return False
        if len(flight.sequences) != len(self._running) or (self._waiting and self._slots):
            return False
        return all(
            sequence.slot >= 0
            and sequence.request.constraint is None
            and sequence.drawn + 1 < sequence.request.max_tokens
            and len(sequence.ids) < plan.context
            and self._has_pages(sequence, sequence.filled + 1)
            for sequence in flight.sequences
        )

    def _has_pages(self, sequence: BatchSequence, positions: int) -> bool:
        """Takes the pages for `positions` if there are any free; sends nobody away."""
        missing = _pages_for(positions) - len(sequence.pages)
        pages = take_pages(self._pages, self._state, missing) if missing > 0 else []
        sequence.pages += pages or []
        return pages is not None

    def _ahead(self, flight: Flight) -> Flight:
        """Dispatches the next sweep of a flight's sequences, with the tokens that are on the device."""
        positions, table = flight.placed
        ids, rows, positions = next_rows(flight.out[0], tuple(flight.rows), positions, self._draws.spare)
        old = flight.group
        pages = table_of([sequence.pages for sequence in flight.sequences], len(old.positions))
        if pages.shape != old.table.shape or (pages != old.table).any():
            table = self.model.put(pages)
        # Of positions that are on the device the host needs to know only which rows are padding.
        group = Group(ids, np.minimum(old.positions[:, :1], 0), pages)
        (x,) = shared_sweep(self.model, [group], self._state, [[(positions, table)]])
        for sequence in flight.sequences:
            sequence.filled += 1
        return self._fly(flight.sequences, group, (positions, table), x, Rows(*rows))

    def _prompts(self, sequences: Sequence[BatchSequence]) -> list[list[BatchSequence]]:
        """Prompts whose next chunks are padded to one size share a call, and so the decoding of the weights."""
        if self._rows_per_call == 1:
            return [[sequence] for sequence in sequences]
        by_width: dict[int, list[BatchSequence]] = {}
        for sequence in sequences:
            by_width.setdefault(self._width(sequence), []).append(sequence)
        return list(by_width.values())

    def _width(self, sequence: BatchSequence) -> int:
        """Rows of a sequence in this sweep: the next chunk of its prompt, padded, or one token."""
        chunk = self.model.plan.prefill_chunk
        return 1 if sequence.decodes else padded_rows(min(sequence.pending, chunk), chunk)

    def _group(self, sequences: Sequence[BatchSequence], width: int) -> Group:
        """The tokens of one call: the next `width` of each sequence, or as many as it has, its draft included."""
        rows = self.rows_of(len(sequences), width)
        ids = np.zeros((rows, width), np.int32)
        positions = np.full((rows, width), -1, np.int32)
        for row, sequence in enumerate(sequences):
            part = [*sequence.ids[sequence.filled : sequence.filled + width], *sequence.draft]
            ids[row, : len(part)] = part
            positions[row, : len(part)] = np.arange(sequence.filled, sequence.filled + len(part))
        return Group(ids, positions, table_of([sequence.pages for sequence in sequences], rows))

    def _rows(self, group: Group, sequences: Sequence[BatchSequence]) -> Rows:
        """What the draws of a call take."""
        rows = len(group.ids)
        slots = np.full(rows, self._draws.spare, np.int32)
        tokens, counts = np.full(rows, -1, np.int32), np.zeros(rows, np.int32)
        for row, sequence in enumerate(sequences):
            # A prompt that is not in after this call draws nothing; its row of the sampler's state stays.
            if _comes_in(sequence, group.positions[row]):
                slots[row], tokens[row], counts[row] = sequence.slot, sequence.ids[-1], sequence.drawn
        last = np.maximum((group.positions >= 0).sum(axis=1).astype(np.int32) - 1, 0)
        return Rows(*self.model.put((last, slots, tokens, counts)))

    def _last(self, x: Array, rows: Rows) -> tuple[Array, Rows]:
        """The last positions of a call of prompts, as if they were a decoding call."""
        if x.shape[1] == 1:
            return x, rows
        x, *own = last_rows(x, *rows, self.rows_of(len(x)), np.int32(self._draws.spare))
        return x, Rows(*own)

    def _decoding(
        self, group: Group, placed: tuple[Array, Array], rows: int
    ) -> tuple[Group, tuple[Array, Array]]:
        """A call of prompts as the decoding call of `rows` sequences that the next one follows."""
        if group.positions.shape[1] == 1:
            return group, placed
        positions = np.full((rows, 1), -1, np.int32)
        positions[: len(group.positions), 0] = group.positions.max(axis=1)
        on_device = self.model.put(positions)
        return group._replace(positions=positions), (on_device, placed[1])

    def _fly(
        self,
        sequences: list[BatchSequence],
        group: Group,
        placed: tuple[Array, Array],
        x: Array,
        rows: Rows,
    ) -> Flight:
        """Dispatches the draws of a decoding call."""
        out = self._launch(x, rows, sequences, None)
        if self.model.stages:
            # Asked for later, they would wait for the layers of other sequences, which the device is given meanwhile.
            jax.tree.map(lambda part: part.copy_to_host_async(), out)
        return Flight(sequences, group, placed, x, rows, out)

    def _draw(
        self,
        x: Array,
        finished: Sequence[tuple[int, BatchSequence]],
        rows: Rows,
        masks: dict[int, Future],
    ) -> list[Event]:
        """Draws the next token of those rows of a call whose sequences have nothing pending."""
        failed, allowed = self._allowed(len(rows.slots), finished, masks)
        out = self._launch(x, rows, [sequence for _, sequence in finished], allowed)
        return self._read(x, finished, rows, out, failed, allowed)

    def _launch(
        self, x: Array, rows: Rows, sequences: Sequence[BatchSequence], allowed: np.ndarray | None
    ) -> Any:
        """Dispatches the draws of a call."""
        top = MAX_TOP_LOGPROBS if any(sequence.request.top_logprobs for sequence in sequences) else 0
        return self._draws.launch(x, rows, [sequence.slot for sequence in sequences], allowed, top)

    def _read(
        self,
        x: Array,
        finished: Sequence[tuple[int, BatchSequence]],
        rows: Rows,
        out: Any,
        failed: dict[int, str],
        allowed: np.ndarray | None,
    ) -> list[Event]:
        """Waits for draws and takes each token to its sequence."""
        drawn, logprobs, top_ids, top_logprobs, entropies = jax.device_get(out)
        events = []
        for row, sequence in finished:
            if sequence.number in failed:
                events.append(self._fail(sequence, failed[sequence.number]))
                continue
            count = sequence.request.top_logprobs
            alternatives = tuple(
                zip(top_ids[row, :count].tolist(), top_logprobs[row, :count].tolist(), strict=True)
            )
            if drawn[row] < 0:
                own = None if allowed is None else allowed[row : row + 1]
                events.append(self._undrawn(sequence, x[row : row + 1], rows.last[row : row + 1], own))
                continue
            event = self._advance(sequence, int(drawn[row]), float(logprobs[row]), alternatives)
            events.append(event._replace(entropy=float(entropies[row])) if count else event)
        return events

    def _allowed(
        self, rows: int, finished: Sequence[tuple[int, BatchSequence]], masks: dict[int, Future]
    ) -> tuple[dict[int, str], np.ndarray | None]:
        """The packed masks `[B, W]` of the rows, None if nobody is constrained; and whose mask failed, and how."""
        constrained = [(row, sequence.number) for row, sequence in finished if sequence.number in masks]
        if not constrained:
            return {}, None
        allowed = np.full((rows, self._mask_words), np.uint32(0xFFFFFFFF))
        failed = {}
        for row, number in constrained:
            try:
                allowed[row] = masks[number].result()
            except Exception as error:
                failed[number] = f"the constraint failed: {error}"
        return failed, allowed

    def _advance(
        self, sequence: BatchSequence, token: int, logprob: float, top: tuple[tuple[int, float], ...]
    ) -> Event:
        request = sequence.request
        if request.constraint is not None:
            try:
                request.constraint.advance(token)
            except Exception as error:
                return self._fail(sequence, f"the constraint failed: {error}")
        sequence.ids.append(token)
        sequence.drawn += 1
        self.stats.generated_tokens += 1
        if sequence.draft and self._drafts is not None and self._drafts.take(sequence, token):
            self._fill(sequence, 1)
        reason: Finish = ""
        if token in request.stop_ids or (request.constraint is not None and request.constraint.finished):
            reason = "stop"
        elif sequence.drawn == request.max_tokens:
            reason = "length"
        elif len(sequence.ids) > self.model.plan.context:
            # The drawn token itself has no room in the cache: it is given out, and that is the end.
            reason = "context"
        if reason:
            self._leave(sequence)
        return Event(
            sequence.number,
            token,
            logprob,
            top,
            reason,
            cached_tokens=sequence.cached,
            accepted_tokens=sequence.accepted,
            rejected_tokens=sequence.rejected,
        )

    def _undrawn(self, sequence: BatchSequence, x: Array, last: Array, allowed: np.ndarray | None) -> Event:
        """Ends a sequence for which no token could be drawn, and says why."""
        if allowed is not None and not allowed.any():
            self._leave(sequence)
            return Event(sequence.number, None, 0.0, (), "grammar", "the grammar allows no further token")
        return self._fail(sequence, self._draws.why_not(sequence.slot, sequence.ids[-1], x, last, allowed))

    def _fail(self, sequence: BatchSequence, error: str) -> Event:
        self._leave(sequence)
        return Event(sequence.number, None, 0.0, (), "error", error)

    def _start_over(self) -> None:
        """After a sweep that failed: donated pages may be gone, so everything in them is.

        Sequences that took no part in it lose their cache too, and begin again from their tokens.
        """
        for sequence in list(self._running):
            self._leave(sequence)
            sequence.filled, sequence.total = 0, 0.0
            bisect.insort(self._waiting, sequence, key=lambda s: s.number)
        self._flight = None
        self.model.wait()
        with contextlib.suppress(RuntimeError):  # donated to the step that failed
            self._state.close()
        self._open_state()

    def _count(self) -> None:
        stats, run = self.stats, self.model.stats
        stats.sweeps, stats.bytes_streamed, stats.wait_s = run.sweeps, run.bytes_streamed, run.wait_s
        stats.experts, stats.links = run.experts, run.links
        stats.peak_device_bytes = peak_device_bytes(*self.model.devices)


def _mask(constraint: Constraint) -> np.ndarray:
    return constraint.mask()


def _comes_in(sequence: BatchSequence, positions: np.ndarray) -> bool:
    """Whether nothing of a sequence is pending after a call with its tokens at some positions, negative for padding."""
    return bool(sequence.pending == (positions >= 0).sum())


def _pages_for(positions: int) -> int:
    return -(-positions // KV_PAGE)


def _split(sequences: Sequence[BatchSequence], size: int) -> Iterable[Sequence[BatchSequence]]:
    return (sequences[at : at + size] for at in range(0, len(sequences), size))
