"""The engine's front: text in, text out. Notebooks, server and launcher all stand on it."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from airjax import engine, sampling
from airjax.engine import drafting
from airjax.engine.memory import free_device_bytes as free_device_bytes
from airjax.engine.memory import free_host_bytes as free_host_bytes
from airjax.plan import GIB, Plan, PlanError, Resident, Switch
from airjax.streaming import Links, Timeline
from airjax.text import ChatTemplate, Grammar, StopStrings, Tokenizer
from airjax.text import grammar as grammars

ComputeDtype = Literal["float32", "bfloat16", "float16"]
KVDtype = Literal["auto", "f32", "f16", "bf16", "q8_0"]
_KV_DTYPES = ("auto", "f32", "f16", "bf16", "q8_0")
_COMPUTE_DTYPES = ("float32", "bfloat16", "float16")


class RequestError(ValueError):
    """A request that cannot be run: an empty prompt, one longer than the context, a parameter out of range."""


class Token(NamedTuple):
    """One step of a generation.

    Attributes:
      id: the drawn token; -1 where text that was held back follows the last one.
      text: what it adds to the text; empty while a character or a possible stop string is unfinished.
      logprob: its log-probability under the model, in nats, before the sampler.
    """

    id: int
    text: str
    logprob: float


class Engine:
    """An open model with its tokenizer. Use `airjax.load` to make one; it is a context manager.

    Attributes:
      model: the open model, which runs one sequence.
      lanes: models that batches run in side by side; more than one with replicas and pipelines.
      tokenizer: text to ids and back.
      drafts: how `generate` and `chat` guess the next tokens; None where they don't.
      plan: what lives where.
      stats: what the last run measured.
    """

    def __init__(
        self,
        lanes: Sequence[engine.Model],
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        drafts: drafting.Drafts | None = None,
    ) -> None:
        self.model = lanes[0]
        self.lanes = tuple(lanes)
        self.tokenizer = tokenizer
        self.drafts = drafts
        self._template = template
        self._state: engine.State | None = None

    @property
    def chat_template(self) -> ChatTemplate | None:
        """The file's chat template, if it has one."""
        return self._template

    @property
    def plan(self) -> Plan:
        """What lives where."""
        return self.model.plan

    @property
    def stats(self) -> engine.Stats:
        """What the last run measured."""
        self.model.count_fetched(wait=False)
        return self.model.stats

    @property
    def timeline(self) -> Timeline | None:
        """The recorded events, if the engine was loaded with `trace=True`."""
        return self.model.timeline

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Teacher-forced logits: row t is the model's view of token t + 1.

        Args:
          ids: at least one token, at most as many as the context.

        Returns:
          float32 `[T, V]`.

        Raises:
          RequestError: too few or too many tokens, or one outside the vocabulary.
        """
        ids = self._check_ids(ids, room=0)
        out = np.empty((len(ids), self.model.config.vocab_size), np.float32)
        at = 0
        for piece in engine.score(self.model, self._begin(), ids):
            out[at : at + len(piece)] = np.asarray(piece)
            at += len(piece)
        return out

    def generate(
        self,
        ids: Sequence[int],
        *,
        sampler: sampling.Transform | None = None,
        key: jax.Array | None = None,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        grammar: Grammar | None = None,
        constraint: engine.Constraint | None = None,
        steering: Mapping[int, np.ndarray] | None = None,
        beside: engine.Beside | None = None,
    ) -> Iterator[Token]:
        """Generates after a prompt of token ids.

        Args:
          ids: the prompt, at least one token, fewer than the context.
          sampler: transform of the logits; None is greedy.
          key: the randomness, `jax.random.key(seed)`; None is key 0.
          max_tokens: how many at most; None for as many as the context holds.
          stop: strings that end the generation; they are not part of the text.
          ignore_eos: go on after an end-of-generation token.
          grammar: what the text must match, from `grammar`.
          constraint: a rule of one's own over the next token, instead of a grammar.
          steering: vectors `[D]` to add to the hidden states, by depth; see `capture`.
          beside: a second sequence to combine the distribution with, for guidance with a negative prompt or for
            contrastive decoding.

        Yields:
          Tokens as they are drawn; the end-of-generation token only if text that was held back must follow.
          Afterwards `stats.finish_reason` says why it ended: "grammar" where the grammar allowed no token.

        Raises:
          RequestError: the request cannot be run; raised here, before the first token is asked for.
          DrawError: no token can be drawn, and it is not the grammar; names the transform that left none.
        """
        ids = self._check_ids(ids, room=1)
        _check_ends(max_tokens, stop)
        if grammar is not None and constraint is not None:
            raise RequestError("give a grammar or a constraint, not both")
        options: dict[str, Any] = {
            "sampler": sampling.greedy() if sampler is None else sampler,
            "key": jax.random.key(0) if key is None else key,
            "max_tokens": self.plan.context if max_tokens is None else max_tokens,
            "stop_ids": frozenset() if ignore_eos else self.tokenizer.eog_ids,
            "constraint": constraint if grammar is None else grammar.constraint(),
        }
        if beside is not None and steering:
            raise RequestError("a sequence beside another cannot be steered: give beside or steering")
        state = self._begin()
        if beside is None and not steering and self.drafts is not None:
            law = self.drafts.law()
            draws = drafting.generate_drafted(
                self.model,
                state,
                ids,
                drafter=self.drafts.drafter(state, options["sampler"], law),
                draft_max=self.drafts.draft_max,
                law=law,
                **options,
            )
        elif beside is None:
            hook = engine.steering(self.model, steering) if steering else None
            draws = engine.generate(self.model, state, ids, hook=hook, **options)
        else:
            state.close()  # the two sequences have a cache of their own
            draws = engine.generate_beside(self.model, ids, beside, **options)
        return self._texts(draws, tuple(stop))

    def capture(
        self,
        ids: Sequence[int],
        *,
        hidden: Sequence[int] = (),
        attention: Sequence[int] = (),
        steering: Mapping[int, np.ndarray] | None = None,
    ) -> engine.Captured:
        """Hidden states and attention of a text; see `airjax.engine.capture`.

        Args:
          ids: the text.
          hidden: depths: 0 is the embedding's output, n what comes out of the n-th layer.
          attention: layers, from 0.
          steering: vectors `[D]` to add to the hidden states, by depth.

        Raises:
          ValueError: something does not fit the model.
        """
        return engine.capture(
            self.model, self._check_ids(ids, room=0), hidden=hidden, attention=attention, steer=steering
        )

    def logit_lens(
        self,
        ids: Sequence[int],
        depths: Sequence[int] | None = None,
        *,
        top: int = 5,
        steering: Mapping[int, np.ndarray] | None = None,
    ) -> engine.Lens:
        """What the model would say after each of `depths`, None for all; see `airjax.engine.logit_lens`."""
        depths = range(self.model.config.n_layers + 1) if depths is None else depths
        return engine.logit_lens(
            self.model, self._check_ids(ids, room=0), tuple(depths), top=top, steer=steering
        )

    def token_stats(self, ids: Sequence[int], *, top: int = 0) -> engine.TokenStats:
        """Entropy, varentropy, surprisal and alternatives along a text; see `airjax.engine.token_stats`."""
        return engine.token_stats(self.model, self._check_ids(ids, room=0), top=top)

    def session(self, ids: Sequence[int], key: jax.Array | None = None) -> engine.Session:
        """A sequence as a value, which `resume`, `fork`, `rollback`, `save` and `restore` take. Close it in the end.

        Args:
          ids: what it begins with.
          key: the randomness of all its draws; None is key 0.
        """
        return engine.new_session(
            self.model, self._check_ids(ids, room=1), jax.random.key(0) if key is None else key
        )

    def resume(
        self,
        session: engine.Session,
        *,
        sampler: sampling.Transform | None = None,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
    ) -> Iterator[Token]:
        """Goes on with a session, which grows by each drawn token; arguments and results are those of `generate`."""
        _check_ends(max_tokens, stop)
        draws = engine.resume(
            self.model,
            session,
            sampler=sampling.greedy() if sampler is None else sampler,
            max_tokens=self.plan.context if max_tokens is None else max_tokens,
            stop_ids=frozenset() if ignore_eos else self.tokenizer.eog_ids,
        )
        return self._texts(draws, tuple(stop))

    def fork(self, session: engine.Session) -> engine.Session:
        """A copy of a session that goes its own way; see `airjax.engine.fork`."""
        return engine.fork(self.model, session)

    def rollback(self, session: engine.Session, count: int) -> None:
        """Forgets the last `count` tokens of a session; see `airjax.engine.rollback`."""
        engine.rollback(self.model, session, count)

    def save(self, session: engine.Session, path: str | os.PathLike[str]) -> None:
        """Writes a session to a file; see `airjax.engine.save`."""
        engine.save(self.model, session, path)

    def restore(self, path: str | os.PathLike[str]) -> engine.Session:
        """Reads a session from a file; refused if it was made with another model. See `airjax.engine.restore`."""
        return engine.restore(self.model, path)

    def generate_batch(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        samplers: Sequence[sampling.Transform] | sampling.Transform | None = None,
        keys: Sequence[jax.Array] | None = None,
        max_tokens: int | None = None,
        ignore_eos: bool = False,
        grammars: Sequence[Grammar | None] | Grammar | None = None,
    ) -> Iterator[tuple[int, Token]]:
        """Generates after several prompts at once: all sequences share each sweep.

        Args:
          prompts: token ids, of any lengths; more than the engine's `max_batch` take turns.
          samplers: one for all, or one each, of the same structure; None is greedy.
          keys: the randomness of each; None is `jax.random.key(n)` for the n-th.
          max_tokens: how many at most for each; None for as many as the context holds.
          ignore_eos: go on after an end-of-generation token.
          grammars: what the texts must match: one for all, or one each; None for anything. A sequence whose grammar
            allows no further token just ends.

        Yields:
          `(n, token)` as tokens of the n-th prompt are drawn. `stats` is not touched: the scheduler has its own.

        Raises:
          RequestError: the engine was not loaded with `max_batch`, or a request cannot be run.
        """
        if not isinstance(samplers, Sequence) or isinstance(samplers, sampling.Transform):
            samplers = [sampling.greedy() if samplers is None else samplers] * len(prompts)
        keys = [jax.random.key(n) for n in range(len(prompts))] if keys is None else keys
        stop_ids = frozenset() if ignore_eos else self.tokenizer.eog_ids
        if grammars is None or isinstance(grammars, Grammar):
            grammars = [grammars] * len(prompts)
        requests = [
            engine.Request(
                ids=tuple(self._check_ids(ids, room=1)),
                sampler=sampler,
                key=key,
                max_tokens=self.plan.context if max_tokens is None else max_tokens,
                stop_ids=stop_ids,
                constraint=None if grammar is None else grammar.constraint(),
            )
            for ids, sampler, key, grammar in zip(prompts, samplers, keys, grammars, strict=True)
        ]
        return self._batch(requests)

    def grammar(
        self,
        *,
        gbnf: str | None = None,
        json_schema: str | dict[str, Any] | bool | None = None,
        regex: str | None = None,
        lark: str | None = None,
        where: str = "the grammar",
    ) -> Grammar:
        """Compiles a grammar for this model's tokens; see `airjax.text.grammar.compile`."""
        return grammars.compile(
            self.tokenizer, gbnf=gbnf, json_schema=json_schema, regex=regex, lark=lark, where=where
        )

    def watch(self, timeline: Timeline | None) -> None:
        """Records what all devices do from their next sweeps on; None ends that. Not within a sweep."""
        for lane in self.lanes:
            lane.watch(timeline)

    def scheduler(
        self, sampler: sampling.Transform, *, batch_invariant: bool = False, first_pages: int | None = None
    ) -> engine.Scheduler | engine.Spread:
        """Continuous batching over this model, for requests whose samplers have the structure of `sampler`.

        With replicas and pipelines requests are spread over as many batches as there are devices.

        Args:
          sampler: see `engine.Scheduler`, as for the others.
          batch_invariant: decode each sequence in a call of its own.
          first_pages: pages of the KV cache to begin with.

        Raises:
          RequestError: the engine was not loaded with `max_batch`.
        """
        if not self.plan.max_batch:
            raise RequestError("this engine runs one sequence at a time: pass max_batch to airjax.load")
        made: list[engine.Scheduler] = []
        try:
            for lane in self.lanes:
                made.append(
                    self.lane_scheduler(
                        lane, sampler, batch_invariant=batch_invariant, first_pages=first_pages
                    )
                )
        except BaseException:
            for each in made:
                each.close()
            raise
        return made[0] if len(made) == 1 else engine.Spread(made)

    def lane_scheduler(
        self,
        lane: engine.Model,
        sampler: sampling.Transform,
        *,
        batch_invariant: bool = False,
        first_pages: int | None = None,
    ) -> engine.Scheduler:
        """Continuous batching in one of `lanes` alone."""
        return engine.Scheduler(
            lane,
            sampler=sampler,
            batch_invariant=batch_invariant,
            draft_max=0 if self.drafts is None else self.drafts.draft_max,
            # A draft model is on the first device alone.
            draft_model=None if self.drafts is None or lane is not self.model else self.drafts.draft_model,
            first_pages=first_pages,
        )

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **extra: Any
    ) -> list[int]:
        """The prompt of a conversation, by the file's own template.

        Args:
          messages: dicts with "role" and "content".
          add_generation_prompt: end with the opening of the assistant's turn.
          **extra: further variables of the template, such as `tools`.

        Raises:
          RequestError: the file has no template.
          TextError: the template refused the messages, or failed.
        """
        if self._template is None:
            raise RequestError(
                f"{self.model.gguf.path} has no chat template: it is a base model, so use generate with a plain prompt"
            )
        text = self._template.render(messages, add_generation_prompt=add_generation_prompt, **extra)
        # The template writes the BOS itself where the model wants one.
        bos = self.tokenizer.bos_id
        begins_with_bos = bos is not None and text.startswith(self.tokenizer.decode([bos]))
        return self.tokenizer.encode(text, add_bos=False if begins_with_bos else None, parse_special=True)

    def chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> Iterator[Token]:
        """The assistant's reply to a conversation: `apply_chat_template`, then `generate` with `options`.

        The end-of-turn texts that the template writes, where they are no tokens, are stop strings too.
        """
        ids = self.apply_chat_template(messages)
        stop = tuple(options.pop("stop", ()))
        ends = self._template.stop_strings if self._template is not None else ()
        return self.generate(ids, stop=(*stop, *ends), **options)

    def close(self) -> None:
        """Frees device memory, threads, pinned memory and the file."""
        self.model.wait()
        if self._state is not None:
            self._state.close()
            self._state = None
        if self.drafts is not None:
            self.drafts.close()
        with contextlib.ExitStack() as stack:
            for lane in self.lanes:
                stack.callback(lane.close)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(self) -> engine.State:
        """Fresh counters and an empty cache."""
        self.model.stats = engine.Stats()
        self.model.wait()
        if self._state is not None:
            self._state.close()
        self._state = engine.new_state(self.model)
        return self._state

    def _batch(self, requests: Sequence[engine.Request]) -> Iterator[tuple[int, Token]]:
        if not requests:
            return
        scheduler = self.scheduler(requests[0].sampler)
        try:
            numbers = {scheduler.submit(request): n for n, request in enumerate(requests)}
            streams = [self.tokenizer.stream(skip_special=True) for _ in requests]
            while scheduler.busy:
                for event in scheduler.step():
                    n = numbers[event.request]
                    if event.token is None and event.finish_reason != "grammar":
                        raise RuntimeError(f"sequence {n} ended early: {event.error}")
                    hidden = event.token is None or (
                        event.finish_reason == "stop" and event.token in self.tokenizer.eog_ids
                    )
                    text = "" if event.token is None or hidden else streams[n].push(event.token)
                    text += streams[n].flush() if event.finish_reason else ""
                    if event.token is not None or text:
                        yield n, Token(-1 if event.token is None else event.token, text, event.logprob)
        finally:
            scheduler.close()

    def _check_ids(self, ids: Sequence[int], room: int) -> list[int]:
        ids = [int(token) for token in ids]
        context, vocabulary = self.plan.context, self.model.config.vocab_size
        if not ids:
            raise RequestError("the prompt is empty: give at least one token")
        if len(ids) + room > context:
            raise RequestError(
                f"the prompt has {len(ids)} tokens but the context holds {context}: shorten it or raise --context"
            )
        outside = [token for token in ids if not 0 <= token < vocabulary]
        if outside:
            raise RequestError(f"token ids must be between 0 and {vocabulary - 1}, got {outside[0]}")
        return ids

    def _texts(self, draws: Iterator[engine.Draw], stop: tuple[str, ...]) -> Iterator[Token]:
        stream, stops = self.tokenizer.stream(skip_special=True), StopStrings(stop)
        for draw in draws:
            ended = self.stats.finish_reason != ""
            # A grammar may end the text too, with a token that belongs to it.
            by_token = self.stats.finish_reason == "stop" and draw.id in self.tokenizer.eog_ids
            text = stops.push(("" if by_token else stream.push(draw.id)) + (stream.flush() if ended else ""))
            if ended:  # nothing may be left behind
                text += stops.flush()
            if stops.stopped:
                self.stats.finish_reason = "stop"
                yield Token(draw.id, text, draw.logprob)
                return
            if not by_token or text:
                yield Token(draw.id, text, draw.logprob)
        if self.stats.finish_reason == "grammar":
            text = stops.push(stream.flush()) + stops.flush()
            if text:
                yield Token(-1, text, 0.0)


def load(
    path: str | os.PathLike[str],
    *,
    vram_budget_gib: float | None = None,
    ram_budget_gib: float | None = None,
    stream_depth: int = 3,
    resident: Resident = "auto",
    kv_shuttle: Switch = "auto",
    context: int | None = None,
    compute_dtype: ComputeDtype | None = None,
    kv_dtype: KVDtype = "auto",
    tier: str = "auto",
    prefill_chunk: int | None = None,
    max_batch: int | None = None,
    kv_tokens: int | None = None,
    draft: str | os.PathLike[str] = "none",
    draft_max: int | None = None,
    trace: bool = False,
    device: jax.Device | None = None,
    devices: int | Literal["auto"] = 1,
    parallel: engine.Parallel = "auto",
    links: Links | None = None,
) -> Engine:
    """Opens a GGUF file for generation.

    Args:
      path: the file; for a split one any of its parts.
      vram_budget_gib: device memory to use; None for what is free, less a margin.
      ram_budget_gib: host memory to use for weights; None for what is available, less a margin.
      stream_depth: slots of the ring.
      resident: "auto" keeps as many layers on the device as fit (of a mixture of experts all but the experts, and as
        many of these as fit), "none" streams all, "all" streams nothing, "dense" streams experts even if all would fit.
      kv_shuttle: "on" keeps the KV cache on the host, "auto" does so where it does not fit.
      context: positions of the KV cache; None for the model's own, at most 4096.
      compute_dtype: of products; None for bfloat16 on a GPU and float32 on a CPU.
      kv_dtype: how the KV cache is stored: "f32", "f16", "bf16", or "q8_0" for 8-bit integers with a scale for each
        32 elements; "auto" for the compute dtype.
      tier: how streamed layers reach the device; see `airjax.plan.Tier`.
      prefill_chunk: tokens of a prompt that share a sweep; None for 512. With 1 a prompt takes the very steps
        of decoding, so its logits are bit for bit those that decoding saw.
      max_batch: sequences that may share a sweep, for `generate_batch` and `scheduler`; None for one alone.
      kv_tokens: positions that the caches of a batch hold together; None for the context of every sequence.
      draft: how `generate` and `chat` guess the next tokens, which one sweep then checks: "none"; "lookup" for what
        followed in prompt and output where the newest tokens stood before; "self" for the layers that stay on the
        device; or the path of a smaller GGUF model, all of which stays on the device, within the budget. The last two
        are asked where lookup promises less. In batches "self" is lookup alone. The tokens are the same with and
        without.
      draft_max: tokens of a draft at most; None for 31 where anything is streamed, else 15.
      trace: record a timeline.
      device: None for JAX's first.
      devices: how many share the work; "auto" for all that JAX sees. Budgets of device memory are of each.
      parallel: how they share it: "tensor" cuts each layer into equal parts, which cross as many links at once;
        "pipeline" gives each a run of layers; "replica" a whole model, for requests of its own; "auto" chooses, and
        `plan.parallel_reason` says why. With the last two `max_batch` and `kv_tokens` are of each of as many batches as
        there are devices.
      links: what the links were measured to do, from `airjax.bench.probe_links`, for "auto".

    Raises:
      GGUFError: the file cannot be run.
      TextError: its tokenizer or chat template cannot be used.
      PlanError: the budgets cannot work.
    """
    chosen = choose_devices(devices) if device is None else [device]
    device = next(each for each in chosen if each.process_index == jax.process_index())
    if compute_dtype is None:
        compute_dtype = "float32" if device.platform == "cpu" else "bfloat16"
    for name, value, allowed in (
        ("compute_dtype", compute_dtype, _COMPUTE_DTYPES),
        ("kv_dtype", kv_dtype, _KV_DTYPES),
        ("resident", resident, ("auto", "none", "all", "dense")),
        ("kv_shuttle", kv_shuttle, ("auto", "on", "off")),
        ("parallel", parallel, engine.PARALLEL),
    ):
        if value not in allowed:
            raise RequestError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    if draft_max is not None and not 1 <= draft_max <= drafting.MOST_DRAFTED:
        raise RequestError(f"draft_max must be between 1 and {drafting.MOST_DRAFTED}, got {draft_max}")
    vram_budget_bytes = _budget("vram_budget_gib", vram_budget_gib, free_device_bytes(device))
    ram_budget_bytes = _budget("ram_budget_gib", ram_budget_gib, free_host_bytes())
    if engine.hosts.several():
        _check_hosts(os.fspath(draft))
        vram_budget_bytes, ram_budget_bytes = engine.hosts.least((vram_budget_bytes, ram_budget_bytes))
    kind = os.fspath(draft)
    opened: list[engine.Model] = []
    try:
        left = vram_budget_bytes
        if kind not in ("none", "lookup", "self"):
            smaller = drafting.open_draft_model(
                Path(kind),
                Path(path),
                device=device,
                vram_budget_bytes=vram_budget_bytes,
                ram_budget_bytes=ram_budget_bytes,
                context=context,
                prefill_chunk=prefill_chunk,
                compute_dtype=compute_dtype,
                max_batch=max_batch,
                kv_tokens=kv_tokens,
            )
            opened.append(smaller)
            left = drafting.budget_beside(smaller, vram_budget_bytes)
        try:
            lanes = engine.open_lanes(
                Path(path),
                devices=chosen,
                parallel=parallel,
                links=links,
                vram_budget_bytes=left,
                ram_budget_bytes=ram_budget_bytes,
                context=context,
                stream_depth=stream_depth,
                resident=resident,
                kv_shuttle=kv_shuttle,
                compute_dtype=compute_dtype,
                kv_dtype=kv_dtype,
                tier=tier,
                prefill_chunk=prefill_chunk,
                max_batch=max_batch,
                kv_tokens=kv_tokens,
                drafts=kind != "none",
                timeline=Timeline() if trace else None,
            )
        except PlanError as error:
            if not opened:
                raise
            raise PlanError(f"{drafting.taken(opened[0], vram_budget_bytes)}, and {error}") from error
        opened += lanes
        model = lanes[0]
        engine.check_alike(model)
        where = str(path)
        tokenizer = Tokenizer.from_metadata(model.gguf.metadata, where)
        has_template = "tokenizer.chat_template" in model.gguf.metadata
        template = ChatTemplate.from_metadata(model.gguf.metadata, where) if has_template else None
        drafts = None
        if kind == "lookup" or kind == "self":
            drafts = drafting.Drafts(model, "lookup" if kind == "lookup" else "self", draft_max)
        elif kind != "none":
            between = drafting.translation(opened[0], tokenizer, where)
            drafts = drafting.Drafts(model, "model", draft_max, opened[0], between)
    except BaseException:
        for each in reversed(opened):
            each.close()
        raise
    logging.debug("airjax: %s", model.plan)
    return Engine(lanes, tokenizer, template, drafts)


def _check_ends(max_tokens: int | None, stop: Sequence[str]) -> None:
    if max_tokens is not None and max_tokens < 1:
        raise RequestError(f"max_tokens must be at least 1, got {max_tokens}")
    if isinstance(stop, str) or any(not isinstance(text, str) or not text for text in stop):
        raise RequestError(f"stop must be a list of strings that are not empty, got {stop!r}")


def choose_devices(count: int | str) -> list[jax.Device]:
    """JAX's first devices.

    Raises:
      RequestError: there are fewer.
    """
    if engine.hosts.several():
        return _devices_of_all(count)
    found = jax.local_devices()
    if count == "auto":
        return found
    if not isinstance(count, int) or not 1 <= count <= len(found):
        raise RequestError(
            f"devices must be between 1 and {len(found)}, which JAX sees here, or auto, got {count!r}"
        )
    return found[:count]


def _devices_of_all(count: int | str) -> list[jax.Device]:
    """Those of all processes, in the order of these."""
    found = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    if count not in ("auto", 1, len(found)):
        raise RequestError(
            f"devices must be auto or {len(found)}, all that the {jax.process_count()} processes have, got {count!r}"
        )
    return found


def _check_hosts(draft: str) -> None:
    # How many tokens to guess is decided by what sweeps took, which differs from process to process.
    if draft != "none":
        raise PlanError(
            f"drafts don't work with several processes yet, got draft={draft!r}: pass --draft=none"
        )


def _budget(name: str, gib: float | None, free: int) -> int:
    if gib is None:
        return free
    if not gib > 0 or gib > 1 << 20:
        raise RequestError(f"{name} must be a positive number of GiB, got {gib}")
    return int(gib * GIB)
