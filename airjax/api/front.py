"""An open model: text in, text out."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from airjax import engine, sampling
from airjax.engine import drafting
from airjax.plan import Plan
from airjax.streaming import Timeline
from airjax.text import ChatTemplate, Grammar, StopStrings, Tokenizer
from airjax.text import grammar as grammars


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
        for piece in engine.score(self.model, self._begin(len(ids)), ids):
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
        state = self._begin(len(ids) + 1)
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

    def _begin(self, tokens: int) -> engine.State:
        """Fresh counters and an empty cache, in which so many tokens have room at once."""
        self.model.stats = engine.Stats()
        self.model.wait()
        if self._state is not None:
            self._state.close()
        self._state = engine.new_state(self.model, length=tokens)
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


def _check_ends(max_tokens: int | None, stop: Sequence[str]) -> None:
    if max_tokens is not None and max_tokens < 1:
        raise RequestError(f"max_tokens must be at least 1, got {max_tokens}")
    if isinstance(stop, str) or any(not isinstance(text, str) or not text for text in stop):
        raise RequestError(f"stop must be a list of strings that are not empty, got {stop!r}")
