"""A group with its verdicts at hand: each cell against full, and any two policies at one budget.

judged = judge(group)
judged.against_full(cell, judged.primary).verdict
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from kvbench.report.cell import CellResult
from kvbench.report.comparisons import DECLARED, PRIMARY_QUALITIES, Choices, Comparison, group_comparisons
from kvbench.report.load import Group
from kvbench.units import measure

OTHER_QUALITIES = ("objects_recalled_fraction", "needles_recalled_fraction", "ppl", "rougeL_vs_reference", "kl_to_full")
TIME_RATIOS = ("tpot_ratio_to_full", "ttft_ratio_to_full")
_SWAPPED: Mapping[str, Literal["better", "worse"]] = {"better": "worse", "worse": "better"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """Comparisons of `group` by measure and keys; `primary` is the quality measure that headlines speak of."""

    group: Group
    primary: str | None
    by_pair: Mapping[tuple[str, str, str], Comparison]

    def against_full(self, cell: CellResult, name: str) -> Comparison | None:
        """Return the comparison of the cell with the full cache."""
        return None if self.group.full is None else self.by_pair.get((name, cell.key, self.group.full.key))

    def between(self, first: CellResult, second: CellResult, name: str) -> Comparison | None:
        """Return the comparison as seen from `first`, whichever of the two was compared with the other."""
        found = self.by_pair.get((name, first.key, second.key))
        if found is not None:
            return found
        found = self.by_pair.get((name, second.key, first.key))
        return None if found is None else swapped(found)

    @property
    def qualities(self) -> tuple[str, ...]:
        """Return the primary measure and the others that say something about quality here."""
        if self.primary is None:
            return ()
        others = (name for name in OTHER_QUALITIES if any(cell.estimate(name) for cell in self.group.budgeted))
        return tuple(dict.fromkeys((self.primary, *others)))


def judge(group: Group, choices: Choices = DECLARED) -> Judged:
    """Return the group with every comparison of quality and time that can be made in it."""
    found = group_comparisons(group, choices, (*PRIMARY_QUALITIES, *OTHER_QUALITIES, *TIME_RATIOS))
    by_pair = {(one.measure, one.first.key, one.second.key): one for one in found}
    return Judged(group=group, primary=_primary(group), by_pair=by_pair)


def swapped(one: Comparison) -> Comparison:
    """Return the same comparison as seen from the second cell."""
    verdict = _SWAPPED.get(one.verdict, one.verdict)
    low, high = _negated(one.high), _negated(one.low)
    t_low, t_high = _negated(one.t_high), _negated(one.t_low)
    return replace(
        one, first=one.second, second=one.first, value=-one.value, low=low, high=high,
        t_low=t_low, t_high=t_high, verdict=verdict,
    )  # fmt: skip


def is_better(name: str, one: float, two: float) -> bool:
    """Tell whether `one` is a better value of `name` than `two`."""
    return one > two if measure(name).better == "higher" else one < two


def _negated(value: float | None) -> float | None:
    return None if value is None else -value


def _primary(group: Group) -> str | None:
    for cells in (group.budgeted, group.cells):
        for name in PRIMARY_QUALITIES:
            if any(cell.estimate(name) for cell in cells):
                return name
    return next((name for name in OTHER_QUALITIES if any(cell.estimate(name) for cell in group.cells)), None)
