"""Every comparison of a group: its cells with the full cache, and policies with each other at equal budget.

for one in group_comparisons(group):
    print(one.first.policy, one.measure, one.verdict, one.value, one.low, one.high)
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from itertools import combinations

from kvbench.report.cell import CellResult
from kvbench.report.compare_cells import compare
from kvbench.report.comparison import DECLARED, Choices, Comparison, judged
from kvbench.report.load import Group
from kvbench.stats.holm import holm
from kvbench.stats.margins import smallest_margin
from kvbench.units import MEASURES

__all__ = ["DECLARED", "Choices", "Comparison", "compare", "group_comparisons", "smallest_margin"]
PRIMARY_QUALITIES = ("rougeL_vs_full", "ppl", "rougeL_vs_reference")
PRIMARY_LATENCY = "tpot_ratio_to_full"
PRIMARY_BUDGET = 0.2


def group_comparisons(
    group: Group, choices: Choices = DECLARED, only: Collection[str] | None = None
) -> tuple[Comparison, ...]:
    """Return every budgeted cell against full, and every two policies at equal budget, in every measure or `only` some.

    Verdicts are corrected by Holm within a measure: those against full are one family, those between policies another.
    """
    names = [
        name
        for name in MEASURES
        if any(cell.estimate(name) for cell in group.budgeted) and (only is None or name in only)
    ]
    found: list[Comparison] = []
    for name in names:
        for pairs in (_against_full(group), _between_policies(group)):
            family = [one for pair in pairs if (one := compare(*pair, name, choices))]
            found.extend(_corrected(family))
    return tuple(_marked(found))


def _against_full(group: Group) -> Iterator[tuple[CellResult, CellResult]]:
    if group.full is not None:
        yield from ((cell, group.full) for cell in group.budgeted if not cell.failed)


def _between_policies(group: Group) -> Iterator[tuple[CellResult, CellResult]]:
    by_budget: dict[str, list[CellResult]] = {}
    for cell in group.budgeted:
        if not cell.failed:
            by_budget.setdefault(cell.budget, []).append(cell)
    for cells in by_budget.values():
        yield from combinations(cells, 2)


def _corrected(family: list[Comparison]) -> list[Comparison]:
    tested = [one for one in family if one.p_value is not None]
    corrected = dict(zip(map(id, tested), holm([one.p_value or 0.0 for one in tested]), strict=True))
    return [judged(one, corrected[id(one)]) if id(one) in corrected else one for one in family]


def _marked(found: Iterable[Comparison]) -> Iterator[Comparison]:
    """Mark the comparisons that were declared before: one quality and one latency measure, at 20 % of the tokens."""
    found = list(found)
    against = [one for one in found if one.second.is_full]
    budgets = sorted({one.first.budget_fraction for one in against if one.first.budget_fraction is not None})
    declared = PRIMARY_BUDGET if PRIMARY_BUDGET in budgets or not budgets else budgets[len(budgets) // 2]
    quality = next((name for name in PRIMARY_QUALITIES if any(one.measure == name for one in against)), None)
    for one in found:
        is_primary = (
            one.second.is_full
            and one.measure in (quality, PRIMARY_LATENCY)
            and one.first.budget_fraction in (declared, None)
        )
        yield replace(one, primary=True) if is_primary else one
