"""How a model's next tokens are guessed: what is chosen once, and makes a drafter for each sequence."""

from __future__ import annotations

from typing import Literal

from airjax.engine.drafting.combined import Combined
from airjax.engine.drafting.drafter import Drafter
from airjax.engine.drafting.law import Acceptance, Costs, Law
from airjax.engine.drafting.ngrams import Lookup
from airjax.engine.drafting.rows import exact, may_run_ahead, padded
from airjax.engine.drafting.smaller import ResidentLayers, SmallerModel, Vocabulary
from airjax.engine.model import Model
from airjax.engine.sweep import State
from airjax.sampling import Transform

MOST_DRAFTED = 31
# A sweep over the link takes the link's time: 2 to 32 rows of a 70B shape took at most 3.3 % more than one (an H100,
# half of the layers streamed). Where all layers stay rows cost arithmetic, 32 of an 8B shape more than two sweeps of
# one: the law would seldom take more than half of them, and each size is compiled.
_MOST_STREAMED, _MOST_RESIDENT = MOST_DRAFTED, 15

Kind = Literal["lookup", "self", "model"]


class Drafts:
    """A choice of drafters for one model, and what was learnt of them.

    Args:
      model: whose tokens are guessed.
      kind: "lookup" in prompt and output; "self" by the resident layers, and "model" by a draft model, each beside
        lookup.
      draft_max: tokens of a draft at most; None for 31 where anything is streamed, else 15.
      smaller: the draft model of the kind "model", open; closed with `close`.
      vocabulary: between the two models; None where they have the same.

    Raises:
      ValueError: `draft_max` is out of range, or the model's layers don't do for the kind "self".
    """

    def __init__(
        self,
        model: Model,
        kind: Kind,
        draft_max: int | None,
        smaller: Model | None = None,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        plan = model.plan
        if draft_max is None:
            streams = plan.streamed or model.pool is not None
            draft_max = _MOST_STREAMED if streams else _MOST_RESIDENT
        if not 1 <= draft_max <= MOST_DRAFTED:
            raise ValueError(f"draft_max must be between 1 and {MOST_DRAFTED}, got {draft_max}")
        if kind == "self" and (not plan.resident or not plan.streamed):
            raise ValueError(
                "draft=self needs layers that stay on the device beside streamed ones, got "
                f"{len(plan.resident)} and {len(plan.streamed)}: pass --draft=lookup or another --vram_budget_gib"
            )
        if kind == "self" and model.pool is not None:
            raise ValueError(
                "draft=self needs layers that stay on the device whole, but experts are streamed one by one: "
                "pass --draft=lookup"
            )
        if kind == "self" and (model.config.shared_kv or model.config.width > model.config.d_model):
            raise ValueError(
                f"draft=self leaves layers out, but each of a {model.config.architecture} model needs what those "
                "before it pass on: pass --draft=lookup"
            )
        if kind == "self" and plan.shuttle:
            raise ValueError("draft=self needs the KV cache on the device: pass --kv_shuttle=off")
        self.draft_max = draft_max
        self._model = model
        self._kind = kind
        self._smaller = smaller
        self._vocabulary = vocabulary
        apart = exact(model)
        self._costs = Costs(apart, (lambda rows: rows) if apart else padded)
        self._acceptance = Acceptance()

    def law(self) -> Law:
        """What decides for one new sequence how many tokens to draft."""
        return Law(self._costs, Acceptance(self._acceptance), may_run_ahead(self._model))

    def drafter(self, state: State, sampler: Transform, law: Law) -> Drafter:
        """A drafter for one new sequence with an empty cache."""
        if self._kind == "lookup":
            return Lookup()
        return Combined(Lookup(), self.slow_drafter(state, sampler), law)

    def slow_drafter(self, state: State, sampler: Transform) -> Drafter:
        """What is asked where lookup promises less, for one new sequence with an empty cache.

        Raises:
          ValueError: there is none.
        """
        if self._kind == "self":
            return ResidentLayers(self._model, state, sampler)
        if self._smaller is None:
            raise ValueError(f"drafts of the kind {self._kind!r} come from lookup alone")
        return SmallerModel(self._smaller, sampler, self._vocabulary)

    @property
    def draft_model(self) -> tuple[Model, Vocabulary | None] | None:
        """The draft model and what translates its tokens; None without one."""
        return None if self._smaller is None else (self._smaller, self._vocabulary)

    def close(self) -> None:
        """Closes the draft model."""
        if self._smaller is not None:
            self._smaller.close()
