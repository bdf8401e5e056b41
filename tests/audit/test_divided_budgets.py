"""Budgets that layers or heads share unevenly, or that a block exceeds: the honest pass, and the others fail."""

from __future__ import annotations

from typing import Any

import pytest

from kvbench.audit.budgets import budget, cache_bytes
from kvbench.audit.evidence import Cell, Note, Peers
from tests.audit.simulated import Machine

TEN = {"fraction": None, "tokens": 10, "of": "seen"}


def cell_with(parts: dict[str, Any], *, mean: float, peak: float, labels: dict[str, str] | None = None) -> Cell:
    """A cell of H2O with these parts, which holds so much at every logged step."""
    body = Machine(3, 6).cell("h2o", TEN)
    body["cell"] = {**body["cell"], "policy": {**body["cell"]["policy"], **parts}}
    body["labels"] = {**body["labels"], **(labels or {})}
    body["curves"]["entries"] = [[seen, mean, peak] for seen, _, _ in body["curves"]["entries"]]
    numbers = {"entries_peak": peak, "entries_mean": mean}
    body["measurements"] |= {name: {**body["measurements"][name], "value": value} for name, value in numbers.items()}
    shares = [mean / seen for seen, _, _ in body["curves"]["entries"]]
    body["measurements"]["realised_budget_fraction"]["value"] = sum(shares) / len(shares)
    return Cell(body=body, folder="0" * 64, attempts=(body,))


def findings(cell: Cell) -> list[str]:
    return [text for text in budget.told(cell, Peers(cells=(cell,))) if not isinstance(text, Note)]


@pytest.mark.parametrize(
    ("parts", "mean", "peak", "is_honest"),
    [
        ({}, 10, 10, True),
        ({}, 10, 16, False),
        ({"allocation": {"class": "kvbench:Pyramid"}}, 10, 16, True),
        ({"allocation": {"class": "kvbench:Pyramid"}}, 10.5, 16, False),
        ({"skip_layers": [0]}, 10, 16, True),
        ({"skip_layers": []}, 10, 16, False),
        ({"every_tokens": 4}, 12, 13, True),
        ({"every_tokens": 4}, 12, 14, False),
        ({"every_tokens": 4, "allocation": {"class": "mine"}}, 13, 20, True),
        ({"every_tokens": 4, "allocation": {"class": "mine"}}, 13.5, 20, False),
    ],
)
def test_what_a_budget_bounds_depends_on_the_parts(
    parts: dict[str, Any], mean: float, peak: float, is_honest: bool
) -> None:
    assert bool(findings(cell_with(parts, mean=mean, peak=peak))) != is_honest


def test_an_outcome_is_told_and_not_held_against_a_cell_unless_no_part_makes_it_one() -> None:
    labels = {"budget_total": "data_dependent"}
    lazy = cell_with({"allocation": {"class": "kvbench:LazyLayers"}}, mean=14, peak=16, labels=labels)
    told = list(budget.told(lazy, Peers(cells=(lazy,))))
    assert [isinstance(text, Note) for text in told] == [True]
    assert "an outcome and not its budget" in told[0]
    assert not [text for text in cache_bytes.told(lazy, Peers(cells=(lazy,))) if "budget is said" in text]
    assert findings(cell_with({}, mean=14, peak=16, labels=labels))
