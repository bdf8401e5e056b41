"""What looks odd in the numbers: policies below `random`, quality that falls where the budget grows.

Each finding also knows what it was looked for in, so that nothing is said about what was never compared.
Every difference is paired by sample and carries its interval; where that interval holds zero the
words say "undecided" instead of naming a winner.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from kvbench.measures import format_value
from kvbench.report.ability import Ability
from kvbench.report.cell import CellResult
from kvbench.report.compare_cells import compare
from kvbench.report.comparison import Comparison
from kvbench.report.comparisons import PRIMARY_QUALITIES
from kvbench.report.difference_text import difference_text
from kvbench.report.load import Group
from kvbench.report.paired import is_better

_REFERENCE = "rougeL_vs_reference"  # a model's answers may be nearer to it by chance, so it shows nothing odd
_RECALLED = ("objects_recalled_fraction", "needles_recalled_fraction")
_ODD_QUALITIES = (*_RECALLED, *(name for name in PRIMARY_QUALITIES if name != _REFERENCE))
QUALITIES = (*_ODD_QUALITIES, _REFERENCE)


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


Pair = tuple[CellResult, CellResult, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Looked:
    """Where an odd order was looked for: pairs that should be in order (worse first), with the measure."""

    pairs: tuple[Pair, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Return the measures compared."""
        return tuple(name for name in _ODD_QUALITIES if any(pair[2] == name for pair in self.pairs))

    @property
    def num_clear(self) -> int:
        """Return how many pairs are shown to be in order."""
        found = (compare(better, worse, name) for worse, better, name in self.pairs)
        return sum(one is not None and one.verdict == "better" for one in found)


def budgets_of(group: Group) -> dict[str, list[CellResult]]:
    """Return the usable budgeted cells by budget, whatever position mode each policy is run in."""
    found = {budget: [cell for cell in cells if not cell.failed] for budget, cells in group.by_budget.items()}
    return {budget: cells for budget, cells in found.items() if cells}


def below_random(group: Group) -> dict[str, list[Contrast]]:
    """Return, by series label, every budget and measure in which a policy scores worse than `random`."""
    found: dict[str, list[Contrast]] = {}
    for contrast in _out_of_order(above_random(group)):
        found.setdefault(group.series_label(contrast.first), []).append(contrast)
    return found


def above_random(group: Group) -> Looked:
    """Return every pair of `random` and another policy at one budget, in every measure that both have.

    Nothing is looked for in a measure that ranks nobody.
    """
    pairs: list[Pair] = []
    names = _ranking(group)
    for cells in budgets_of(group).values():
        for baseline in (cell for cell in cells if cell.policy == "random"):
            for cell in (cell for cell in cells if cell.policy != "random"):
                pairs.extend(_pairs(baseline, cell, names))
    return Looked(pairs=tuple(pairs))


def not_monotone(group: Group) -> list[Contrast]:
    """Return every step to a larger budget (full last) at which a measure gets worse instead of better."""
    return list(_out_of_order(budget_steps(group)))


def budget_steps(group: Group) -> Looked:
    """Return every step of a policy to the next larger budget, full last, in every measure that both cells have."""
    by_series: dict[tuple[str, str, str], list[CellResult]] = {}
    for cell in group.budgeted:
        by_series.setdefault(cell.series, []).append(cell)
    pairs: list[Pair] = []
    names = _ranking(group)
    for cells in by_series.values():
        usable = [cell for cell in cells if not cell.failed]
        ladder = [*usable, group.full] if group.full else usable
        for smaller, larger in itertools.pairwise(ladder):
            if _comparable_budgets(smaller, larger):
                pairs.extend(_pairs(smaller, larger, names))
    return Looked(pairs=tuple(pairs))


def contrast_text(contrast: Contrast) -> str:
    """Return "12.1 % against 30.2 %, paired difference -18.1 [-22.0, -14.0] points over 32 samples"."""
    name, found = contrast.name, contrast.difference
    one, two = contrast.first.estimate(name), contrast.second.estimate(name)
    values = " against ".join(format_value(name, est.value if est else None) for est in (one, two))
    if found.low is None or found.high is None or not found.num_samples:
        return f"{values} (no paired samples; " + ("intervals apart)" if contrast.is_clear else "undecided)")
    noise = "" if contrast.is_clear else ", undecided"
    return f"{values}, paired difference {difference_text(found).replace('/', ' per ')}{noise}"


def _ranking(group: Group) -> list[str]:
    ability = Ability(group)
    return [name for name in _ODD_QUALITIES if not ability.reason(name)]


def _pairs(worse: CellResult, better: CellResult, names: list[str]) -> Iterator[Pair]:
    for name in names:
        if worse.estimate(name) and better.estimate(name):
            yield worse, better, name


def _out_of_order(looked: Looked) -> Iterator[Contrast]:
    """Yield the pairs whose values stand the wrong way round; `first` should have been the better one."""
    for second, first, name in looked.pairs:
        one, two = first.estimate(name), second.estimate(name)
        if one and two and is_better(name, two.value, one.value):
            difference = compare(first, second, name)
            if difference is not None:
                yield Contrast(first=first, second=second, name=name, difference=difference)


def _comparable_budgets(smaller: CellResult, larger: CellResult) -> bool:
    """Tell whether two budgets are ordered: a share and an absolute size are not, full is above both."""
    return larger.is_full or (smaller.budget_fraction is None) == (larger.budget_fraction is None)
