"""What a search asks for, and what one measured budget shows."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvbench.measures import measure
from kvbench.report.comparison import Choices, Comparison
from kvbench.report.frontier import Look, Outcome
from kvbench.results.files import canonical_json
from kvbench.stats.power import look_confidence
from kvbench.stats.tests import is_non_inferior


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is asked: `ladder` rises, `budget_setting` is "fraction" or "tokens"."""

    name: str
    measure: str
    margin: float
    ladder: tuple[float, ...]
    budget_setting: str
    results: Path

    @property
    def choices(self) -> Choices:
        """Return how a look is compared."""
        return Choices(margins={self.measure: self.margin}, confidence=look_confidence(len(self.ladder)))


def default_name(name: str, margin: float, ladder: Sequence[float], settings: Sequence[Mapping[str, Any]]) -> str:
    """Return the name of a search's file: the same question has the same one, whatever versions answer it."""
    asked = {canonical_json({part: one[part] for part in one if part != "versions"}) for one in settings}
    text = canonical_json({"margin": margin, "ladder": list(ladder), "cells": sorted(asked)})
    return f"{name}-{margin:g}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def look_at(budget: float, key: str, found: Comparison, plan: Plan) -> Look:
    """Return what a comparison with full at one budget shows."""
    outcome: Outcome = "undecided"
    if found.low is not None and found.high is not None:
        higher = measure(plan.measure).better == "higher"
        if is_non_inferior(found.low, found.high, higher_is_better=higher, margin=plan.margin):
            outcome = "safe"
        elif (found.high < -plan.margin) if higher else (found.low > plan.margin):
            outcome = "worse"
    numbers: dict[str, Any] = {
        name: getattr(found, name)
        for name in ("value", "low", "high", "num_samples", "num_clusters", "minimum_detectable", "reason")
    }
    realised = found.first.estimate("realised_budget_fraction")
    return Look(
        budget=budget, outcome=outcome, key=key, realised_budget=None if realised is None else realised.value, **numbers
    )


def above(ladder: Sequence[float], rung: int) -> float | None:
    """Return the budget of the rung above, None where there is none."""
    return ladder[rung + 1] if rung + 1 < len(ladder) else None
