"""What looks odd in the numbers: policies below `random`, quality that falls where the budget grows.

Every difference is paired by sample and carries its interval; where that interval holds zero the
words say "undecided" instead of naming a winner.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from kvbench.report.cell import CellResult
from kvbench.report.comparisons import Comparison, compare
from kvbench.report.load import Group
from kvbench.report.paired import is_better
from kvbench.units import format_value, measure

QUALITIES = ("objects_recalled_fraction", "rougeL_vs_full", "ppl", "rougeL_vs_reference")
_ODD_QUALITIES = QUALITIES[:3]


@dataclass(frozen=True, kw_only=True, slots=True)
class Contrast:
    """Two cells in one measure, `first` being the one that the sentence is about."""

    first: CellResult
    second: CellResult
    name: str
    difference: Comparison

    @property
    def is_clear(self) -> bool:
        """True when one of the two is shown to be better: the paired interval leaves zero out."""
        return self.difference.is_clear


def budgets_of(group: Group) -> dict[str, list[CellResult]]:
    """Return the usable budgeted cells by budget, whatever position mode each policy is run in."""
    found: dict[str, list[CellResult]] = {}
    for cell in sorted(group.budgeted, key=lambda cell: cell.sort_key[6:]):
        if not cell.failed:
            found.setdefault(cell.budget, []).append(cell)
    return found


def below_random(group: Group) -> dict[str, list[Contrast]]:
    """Return, by series label, every budget and measure in which a policy scores worse than `random`."""
    found: dict[str, list[Contrast]] = {}
    for cells in budgets_of(group).values():
        for baseline in (cell for cell in cells if cell.policy == "random"):
            for cell in (cell for cell in cells if cell.policy != "random"):
                worse = list(_worse(cell, baseline, _ODD_QUALITIES))
                found.setdefault(group.series_label(cell), []).extend(worse)
    return {label: contrasts for label, contrasts in found.items() if contrasts}


def not_monotone(group: Group) -> list[Contrast]:
    """Return every step to a larger budget (full last) at which a measure gets worse instead of better."""
    by_series: dict[tuple[str, str, str], list[CellResult]] = {}
    for cell in group.budgeted:
        by_series.setdefault(cell.series, []).append(cell)
    found: list[Contrast] = []
    for cells in by_series.values():
        usable = [cell for cell in cells if not cell.failed]
        ladder = [*usable, group.full] if group.full else usable
        for smaller, larger in itertools.pairwise(ladder):
            if _comparable_budgets(smaller, larger):
                found.extend(_worse(larger, smaller, _ODD_QUALITIES))
    return found


def contrast_text(contrast: Contrast) -> str:
    """Return "12.1 % against 30.2 %, paired difference -18.1 [-22.0, -14.0] points over 32 samples"."""
    name, found = contrast.name, contrast.difference
    one, two = contrast.first.estimate(name), contrast.second.estimate(name)
    values = " against ".join(format_value(name, est.value if est else None) for est in (one, two))
    if found.low is None or found.high is None or not found.num_samples:
        return f"{values} (no paired samples; " + ("intervals apart)" if contrast.is_clear else "undecided)")
    unit, factor, places = _difference_unit(name)
    numbers = [f"{number / factor:+.{places}f}" for number in (found.value, found.low, found.high)]
    noise = "" if contrast.is_clear else ", undecided"
    return f"{values}, paired difference {numbers[0]} [{numbers[1]}, {numbers[2]}]{unit}{noise}"


def _difference_unit(name: str) -> tuple[str, float, int]:
    if name == "ppl":
        return " nats per token", 1.0, 3
    return (" points", 0.01, 1) if measure(name).unit == "fraction" else ("", 1.0, 3)


def _worse(first: CellResult, second: CellResult, names: Iterable[str]) -> Iterator[Contrast]:
    for name in names:
        one, two = first.estimate(name), second.estimate(name)
        if one and two and is_better(name, two.value, one.value):
            difference = compare(first, second, name)
            if difference is not None:
                yield Contrast(first=first, second=second, name=name, difference=difference)


def _comparable_budgets(smaller: CellResult, larger: CellResult) -> bool:
    """Tell whether two budgets are ordered: a share and an absolute size are not, full is above both."""
    return larger.is_full or (smaller.budget_fraction is None) == (larger.budget_fraction is None)
