"""A server over several processes: the first one serves, and tells the others what its scheduler is given."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from airjax.api import Engine
from airjax.engine import hosts
from airjax.server.order import Order
from airjax.server.sampler import Settings, make_sampler
from airjax.text import Grammar
from airjax.text.grammar import from_form


class Teller:
    """What the first process's scheduler is given goes to the others, once for each step; alone it does nothing."""

    def __init__(self) -> None:
        self._orders = hosts.Orders() if hosts.several() else None
        self._told: list[tuple[str, Any]] = []

    @property
    def several(self) -> bool:
        """Whether there is somebody to tell."""
        return self._orders is not None

    def submit(self, order: Order) -> None:
        """A generation that the scheduler has taken."""
        if self._orders is not None:
            self._told.append(("submit", to_plain(order)))

    def cancel(self, number: int) -> None:
        """A request that was cancelled."""
        self._told.append(("cancel", number))

    def step(self) -> None:
        """Before a step of the scheduler."""
        if self._orders is not None:
            self._orders.give(self._told)
        self._told = []

    def end(self) -> None:
        """There are no more steps."""
        if self._orders is not None:
            self._orders.give(None)


def follow(open_engine: Callable[[], Engine], first_pages: Callable[[Engine], int | None]) -> None:
    """Runs the steps of the first process's scheduler until that ends.

    Args:
      open_engine: opens it as the first process does.
      first_pages: of its KV cache, as there.
    """
    with open_engine() as opened:
        scheduler = opened.scheduler(make_sampler(Settings()), first_pages=first_pages(opened))
        orders = hosts.Orders()
        try:
            while (told := orders.take()) is not None:
                for what, value in told:
                    if what == "submit":
                        scheduler.submit(from_plain(value, opened).request())
                    else:
                        scheduler.cancel(value)
                scheduler.step()
        finally:
            scheduler.close()


def to_plain(order: Order) -> dict[str, Any]:
    """An order as values for JSON."""
    plain = {field.name: getattr(order, field.name) for field in dataclasses.fields(order)}
    form = None if order.grammar is None else order.grammar.form
    return plain | {
        "settings": dataclasses.asdict(order.settings),
        "stop_ids": sorted(order.stop_ids),
        "grammar": form,
    }


def from_plain(plain: dict[str, Any], opened: Engine) -> Order:
    """What `to_plain` was given."""
    settings: dict[str, Any] = plain["settings"]
    settings |= {
        "dry_sequence_breakers": tuple(settings["dry_sequence_breakers"]),
        "logit_bias": tuple((token, bias) for token, bias in settings["logit_bias"]),
    }
    form: str | None = plain["grammar"]
    grammar: Grammar | None = None if form is None else from_form(opened.tokenizer, form)
    return Order(
        **plain
        | {
            "ids": tuple(plain["ids"]),
            "settings": Settings(**settings),
            "stop_ids": frozenset(plain["stop_ids"]),
            "grammar": grammar,
        }
    )
