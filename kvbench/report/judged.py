"""A group with its verdicts at hand: each cell against full, and any two policies at one budget.

judged = judge(group)
judged.against_full(cell, judged.primary).verdict
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from kvbench.measures import MAX_TURNS, measure
from kvbench.report.ability import Ability
from kvbench.report.cell import CellResult
from kvbench.report.compare_cells import compare
from kvbench.report.comparison import DECLARED, Choices, Comparison, withheld
from kvbench.report.comparison import judged as corrected
from kvbench.report.comparisons import PRIMARY_QUALITIES, between_policies, group_comparisons
from kvbench.report.load import Group
from kvbench.stats.tests import is_latency_ratio, turned

OTHER_QUALITIES = (
    *("objects_recalled_fraction", "needles_recalled_fraction", "ppl", "rougeL_vs_reference", "kl_to_full"),
    "ppl_released",
    *(f"turn{turn}_rougeL_vs_full" for turn in range(2, MAX_TURNS + 1)),
)
MOST_PAIRS = 500
TIME_RATIOS = ("tpot_ratio_to_full", "ttft_ratio_to_full")


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """Comparisons of `group` by measure and keys; `primary` is the quality measure that headlines speak of."""

    group: Group
    primary: str | None
    by_pair: Mapping[tuple[str, str, str], Comparison]
    choices: Choices
    num_pairs: int
    ability: Ability

    def against_full(self, cell: CellResult, name: str) -> Comparison | None:
        """Return the comparison of the cell with the full cache."""
        return None if self.group.full is None else self.by_pair.get((name, cell.key, self.group.full.key))

    def between(self, first: CellResult, second: CellResult, name: str) -> Comparison | None:
        """Return the comparison as seen from `first`, whichever of the two was compared with the other."""
        found = self.by_pair.get((name, first.key, second.key))
        if found is not None:
            return found
        found = self.by_pair.get((name, second.key, first.key))
        if found is not None or self.num_pairs <= MOST_PAIRS:
            return None if found is None else swapped(found)
        found = compare(first, second, name, self.choices)
        if found is None:
            return None
        if found.p_value is not None:
            found = corrected(found, min(1.0, found.p_value * self.num_pairs))
        return withheld(found, self.ability.reason(name))

    @property
    def qualities(self) -> tuple[str, ...]:
        """Return the primary measure and the others that say something about quality here."""
        if self.primary is None:
            return ()
        others = (name for name in OTHER_QUALITIES if any(cell.estimate(name) for cell in self.group.budgeted))
        return tuple(dict.fromkeys((self.primary, *others)))


def judge(group: Group, choices: Choices = DECLARED) -> Judged:
    """Return the group with every comparison of quality and time that can be made in it.

    Of very many policies only those pairs are compared that are asked for, with Bonferroni's correction for all of
    them, which is stricter than Holm's.
    """
    num_pairs = sum(1 for _ in between_policies(group))
    names = (*PRIMARY_QUALITIES, *OTHER_QUALITIES, *TIME_RATIOS)
    found = group_comparisons(group, choices, names, between=num_pairs <= MOST_PAIRS)
    by_pair = {(one.measure, one.first.key, one.second.key): one for one in found}
    return Judged(
        group=group, primary=_primary(group), by_pair=by_pair, choices=choices, num_pairs=num_pairs,
        ability=Ability(group),
    )  # fmt: skip


def swapped(one: Comparison) -> Comparison:
    """Return the same comparison as seen from the second cell."""
    value, low, high, t_low, t_high = (
        _turned(one.measure, number) for number in (one.value, one.high, one.low, one.t_high, one.t_low)
    )
    return replace(
        one, first=one.second, second=one.first, value=value or 0.0, low=low, high=high,
        t_low=t_low, t_high=t_high, verdict=turned(one.verdict),
    )  # fmt: skip


def _turned(name: str, value: float | None) -> float | None:
    """Return the difference the other way round: its negative, of a ratio minus 1 that of the inverse ratio."""
    if value is None or not is_latency_ratio(measure(name)):
        return None if value is None else -value
    return math.inf if value <= -1 else -value / (1 + value)


def _primary(group: Group) -> str | None:
    for cells in (group.budgeted, group.cells):
        for name in PRIMARY_QUALITIES:
            if any(cell.estimate(name) for cell in cells):
                return name
    return next((name for name in OTHER_QUALITIES if any(cell.estimate(name) for cell in group.cells)), None)
