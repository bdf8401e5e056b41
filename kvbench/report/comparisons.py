"""Every comparison of a group: its cells with the full cache, and policies with each other at equal budget.

for one in group_comparisons(group):
    print(one.first.policy, one.measure, one.verdict, one.value, one.low, one.high)
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from itertools import combinations

from kvbench.measures import MEASURES
from kvbench.report.ability import Ability
from kvbench.report.cell import CellResult
from kvbench.report.compare_cells import compare
from kvbench.report.comparison import DECLARED, Choices, Comparison, judged, withheld
from kvbench.report.load import Group
from kvbench.stats.tests import holm

PRIMARY_QUALITIES = ("rougeL_vs_full", "ppl", "rougeL_vs_reference", "turn1_rougeL_vs_full")
PRIMARY_LATENCY = "tpot_ratio_to_full"
PRIMARY_BUDGET = 0.2


def group_comparisons(
    group: Group, choices: Choices = DECLARED, only: Collection[str] | None = None, *, between: bool = True
) -> tuple[Comparison, ...]:
    """Return every budgeted cell against full, and every two policies at equal budget, in every measure or `only` some.

    Verdicts are corrected by Holm within a measure: those against full are one family, those between policies another,
    which is left out without `between`. Where the full cache can not do the task nobody is ranked.
    """
    names = [
        name
        for name in MEASURES
        if any(cell.estimate(name) for cell in group.budgeted) and (only is None or name in only)
    ]
    found: list[Comparison] = []
    for name in names:
        for pairs in (_against_full(group), between_policies(group) if between else ()):
            family = [one for pair in pairs if (one := compare(*pair, name, choices))]
            found.extend(_corrected(family))
    ability = Ability(group)
    return tuple(withheld(one, ability.reason(one.measure)) for one in _marked(group, found))


def _against_full(group: Group) -> Iterator[tuple[CellResult, CellResult]]:
    if group.full is not None:
        yield from ((cell, group.full) for cell in group.budgeted if not cell.failed)


def between_policies(group: Group) -> Iterator[tuple[CellResult, CellResult]]:
    """Yield every two policies at equal budget."""
    for cells in group.by_budget.values():
        yield from combinations((cell for cell in cells if not cell.failed), 2)


def _corrected(family: list[Comparison]) -> list[Comparison]:
    tested = sorted((one for one in family if one.p_value is not None), key=lambda one: one.p_value or 0.0)
    p_values = holm([one.p_value or 0.0 for one in tested])
    found = {id(one): judged(one, p_values[k], len(tested) - k) for k, one in enumerate(tested)}
    return [found.get(id(one), one) for one in family]


def declared_budget(group: Group) -> str | None:
    """Return the budget of the primary comparisons: 20 % of the tokens, else the middle one; failed cells count too.

    It is settled by what was asked for, so that a cell that fails does not move it.
    """
    budgets = list(group.by_budget)
    known = next((cell.budget for cell in group.budgeted if cell.budget_fraction == PRIMARY_BUDGET), None)
    return known or (budgets[len(budgets) // 2] if budgets else None)


def _marked(group: Group, found: Iterable[Comparison]) -> Iterator[Comparison]:
    """Mark the comparisons that were declared before: one quality and one latency measure, at one budget."""
    quality = next((name for name in PRIMARY_QUALITIES if any(cell.estimate(name) for cell in group.budgeted)), None)
    budget = declared_budget(group)
    for one in found:
        is_primary = one.second.is_full and one.measure in (quality, PRIMARY_LATENCY) and one.first.budget == budget
        yield replace(one, primary=True) if is_primary else one
