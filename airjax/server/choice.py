"""One choice of an answer: tokens in, whole characters out, ended by stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from airjax.engine import Event
from airjax.server.tools import MARKS, Call, ToolText
from airjax.text import StopStrings, Tokenizer

Finish = Literal["stop", "length", "tool_calls"]


class TokenNote(NamedTuple):
    """What is known of one token: bytes, log-probability in nats, alternatives, where its text begins and ends."""

    piece: bytes
    logprob: float
    top: tuple[tuple[bytes, float], ...]
    start: int
    end: int


class Delta(NamedTuple):
    """What an event adds to a choice."""

    text: str
    notes: tuple[TokenNote, ...]
    calls: tuple[Call, ...]
    finish: Finish | None


@dataclass
class Choice:
    """A choice as it grows.

    Attributes:
      noted: whether anybody wants the log-probabilities of its tokens.
      tokens: how many were drawn.
      cached_tokens: of its prompt, that came from shared pages.
      accepted_tokens, rejected_tokens: of drafts, that were right, and that were not.
    """

    tokenizer: Tokenizer
    stop: Sequence[str]
    tool_names: Sequence[str] = ()
    noted: bool = False
    tokens: int = 0
    cached_tokens: int = 0
    accepted_tokens: int = 0
    rejected_tokens: int = 0
    _notes: list[TokenNote] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._stream = self.tokenizer.stream(skip_special=True, keep=MARKS if self.tool_names else ())
        self._stops = StopStrings(self.stop)
        self._tools = ToolText(self.tool_names) if self.tool_names else None
        self._decoded = self._given = 0

    def push(self, event: Event) -> Delta:
        """Takes an event that is no error; a `finish` is the end, whatever the engine still draws."""
        assert event.token is not None
        self.tokens += 1
        self.cached_tokens = event.cached_tokens
        self.accepted_tokens, self.rejected_tokens = event.accepted_tokens, event.rejected_tokens
        ended = event.finish_reason != ""
        # A grammar may end the text too, with a token that belongs to it.
        by_token = event.finish_reason == "stop" and event.token in self.tokenizer.eog_ids
        text = "" if by_token else self._stream.push(event.token)
        text += self._stream.flush() if ended else ""
        start, self._decoded = self._decoded, self._decoded + len(text)
        if self.noted and not by_token:
            top = tuple((self.tokenizer.piece(token), logprob) for token, logprob in event.top)
            piece = self.tokenizer.piece(event.token)
            self._notes.append(TokenNote(piece, event.logprob, top, start, self._decoded))
        text = self._stops.push(text) + (self._stops.flush() if ended else "")
        self._given += len(text)
        stopped = self._stops.stopped
        notes = self._take_notes(all_of_them=ended or stopped, cut=stopped) if self.noted else ()
        stopped = stopped or event.finish_reason == "stop"
        finish: Finish | None = "stop" if stopped else "length" if ended else None
        calls: list[Call] = []
        if self._tools is not None:
            text = self._tools.push(text)
            if finish is not None:
                rest, calls = self._tools.finish()
                text += rest
                finish = "tool_calls" if calls else finish
        return Delta(text, notes, tuple(calls), finish)

    def _take_notes(self, all_of_them: bool, cut: bool) -> tuple[TokenNote, ...]:
        """Notes of the tokens whose text has been given out; a token that is cut off whole has none."""
        if all_of_them:
            ready = [note for note in self._notes if not cut or note.start < self._given]
            self._notes = []
        else:
            ready = [note for note in self._notes if note.end <= self._given]
            self._notes = self._notes[len(ready) :]
        return tuple(ready)


def chat_logprobs(notes: Sequence[TokenNote]) -> dict[str, Any]:
    """In the form of chat completions."""

    def entry(piece: bytes, logprob: float) -> dict[str, Any]:
        return {"token": piece.decode("utf-8", "replace"), "logprob": _finite(logprob), "bytes": list(piece)}

    content = [
        {**entry(note.piece, note.logprob), "top_logprobs": [entry(*pair) for pair in note.top]}
        for note in notes
    ]
    return {"content": content, "refusal": None}


def legacy_logprobs(notes: Sequence[TokenNote]) -> dict[str, Any]:
    """In the form of completions."""
    return {
        "tokens": [note.piece.decode("utf-8", "replace") for note in notes],
        "token_logprobs": [_finite(note.logprob) for note in notes],
        "top_logprobs": [
            {piece.decode("utf-8", "replace"): _finite(logprob) for piece, logprob in note.top}
            for note in notes
        ],
        "text_offset": [note.start for note in notes],
    }


def _finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI writes -9999 for what cannot happen."""
    return max(logprob, -9999.0)
