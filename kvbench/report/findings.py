"""Say in words what the numbers show, computed from them: who leads, what it costs, what looks odd.

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
from kvbench.report.paired import is_worse
from kvbench.units import format_value, format_with_interval, measure

QUALITIES = ("objects_recalled_fraction", "rougeL_vs_full", "ppl", "rougeL_vs_reference")
_ODD_QUALITIES = QUALITIES[:3]
_MOST_NAMES = 4


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


def primary_quality(group: Group) -> str | None:
    """Return the measure that headlines speak of: the first that a budgeted cell, or any cell, has."""
    for cells in (group.budgeted, group.cells):
        for name in QUALITIES:
            if any(cell.estimate(name) for cell in cells):
                return name
    return None


def budgets_of(group: Group) -> dict[str, list[CellResult]]:
    """Return the usable budgeted cells by budget, whatever position mode each policy is run in."""
    found: dict[str, list[CellResult]] = {}
    for cell in sorted(group.budgeted, key=lambda cell: cell.sort_key[6:]):
        if not cell.failed:
            found.setdefault(cell.budget, []).append(cell)
    return found


def headlines(group: Group) -> list[str]:
    """Return the sentences on top: full's level, the leader per budget, and what the leader costs."""
    name = primary_quality(group)
    if name is None:
        return ["No cell has a quality measurement yet, so no policy can be named better than another."]
    sentences = [_full_sentence(group, name)]
    for budget, cells in budgets_of(group).items():
        telling = _telling_quality(cells, name)
        ranked = _ranked(cells, telling)
        if ranked:
            sentences.append(_leader_sentence(group, ranked, telling, budget))
    return sentences


def _telling_quality(cells: list[CellResult], primary: str) -> str:
    """Return the primary measure, or the next one where every policy scores 0 in it and none can lead."""
    for name in (primary, *QUALITIES):
        if any(found.value != 0.0 for cell in cells if (found := cell.estimate(name))):
            return name
    return primary


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
    if found.low is None or found.high is None:
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
        if one and two and is_worse(name, one.value, two.value):
            difference = compare(first, second, name)
            if difference is not None:
                yield Contrast(first=first, second=second, name=name, difference=difference)


def _comparable_budgets(smaller: CellResult, larger: CellResult) -> bool:
    """Tell whether two budgets are ordered: a share and an absolute size are not, full is above both."""
    return larger.is_full or (smaller.budget_fraction is None) == (larger.budget_fraction is None)


def _ranked(cells: list[CellResult], name: str) -> list[CellResult]:
    """Return the cells that have the measure, best first."""
    sign = -1.0 if measure(name).better == "higher" else 1.0
    valued = [(sign * found.value, cell.sort_key, cell) for cell in cells if (found := cell.estimate(name))]
    return [cell for _, _, cell in sorted(valued, key=lambda item: item[:2])]


def _with_interval(cell: CellResult, name: str) -> str:
    found = cell.estimate(name)
    return format_with_interval(name, found.value, found.low, found.high) if found else "-"


def _full_sentence(group: Group, name: str) -> str:
    label = measure(name).label
    found = group.full.estimate(name) if group.full else None
    if group.full is None or found is None:
        return f"The full cache has no {label} here, so the distance to it is not known."
    num = f" (n = {found.n})" if found.n is not None else ""
    return f"With the full cache: {label} {_with_interval(group.full, name)}{num}."


def _leader_sentence(group: Group, ranked: list[CellResult], name: str, budget: str) -> str:
    best = ranked[0]
    if len(ranked) == 1:
        only = f"{group.series_label(best)} alone was measured, {measure(name).label} {_with_interval(best, name)}"
        return f"At {budget}: {only}{_cost_clause(group, best)}."
    text = f"At {budget}: {group.series_label(best)} has the best {measure(name).label}, {_with_interval(best, name)}"
    ties = [cell for cell in ranked[1:] if (found := compare(best, cell, name)) and not found.is_clear]
    if ties:
        names = [group.series_label(cell) for cell in ties]
        more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
        text += f" (undecided against {', '.join(names[:_MOST_NAMES])}{more})"
    else:
        second, value = ranked[1], ranked[1].estimate(name)
        clear = f"clearly ahead of {group.series_label(second)}"
        text += f", {clear} ({format_value(name, value.value if value else None)})"
    return f"{text}{_cost_clause(group, best)}."


def _cost_clause(group: Group, cell: CellResult) -> str:
    parts: list[str] = []
    mine = cell.estimate("kv_stored_bytes")
    full = group.full.estimate("kv_stored_bytes") if group.full else None
    if mine and full and full.value > 0:
        parts.append(f"KV bytes {mine.value / full.value:.2f}x")
    for name, what in (("tpot_ratio_to_full", "time per output token"), ("ttft_ratio_to_full", "time to first token")):
        if cell.estimate(name):
            parts.append(f"{what} {_with_interval(cell, name)}")
    return f". Its cost relative to full: {', '.join(parts)}" if parts else ""
