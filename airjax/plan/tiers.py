"""How weights reach the device."""

from __future__ import annotations

import os

from airjax.plan.values import GIB, PlanError, Tier


def choose_tier(tier: str, backend: str, nbytes: int, what: str, ram_budget_bytes: int) -> tuple[Tier, str]:
    """How `nbytes` of streamed weights reach the device, and why so.

    Raises:
      PlanError: the tier that was asked for is none of this backend.
    """
    mapping: Tier = "aliased mapping" if backend == "cpu" else "registered mapping"
    if tier != "auto":
        if tier not in ("ring", "pageable mapping", mapping):
            raise PlanError(
                f"tier must be auto, {mapping}, pageable mapping or ring on this backend, got {tier!r}"
            )
        return tier, "as asked"  # type: ignore[return-value]
    numbers = f"{nbytes / GIB:.3f} GiB of {what}, RAM budget {ram_budget_bytes / GIB:.3f} GiB"
    if nbytes > ram_budget_bytes and hasattr(os, "preadv"):
        return "ring", f"the {what} don't fit in RAM ({numbers})"
    if nbytes > ram_budget_bytes:
        return "pageable mapping", f"the {what} don't fit in RAM, and this system has no preadv ({numbers})"
    return mapping, f"the {what} fit in RAM ({numbers})"
