"""The answer in words: what to take, how far it is from the full cache, and what else the measures say.

Every word comes from a verdict; where samples do not decide, all that may be the best are named.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from kvbench.measures import format_value, format_with_interval, measure
from kvbench.report.cell import CellResult
from kvbench.report.comparison import Comparison
from kvbench.report.difference_text import difference_text, difference_unit, size_text, verdict_remark
from kvbench.report.judged import Judged
from kvbench.report.paired import is_better
from kvbench.report.standing import Standing, asked_budget, safe_cells, standing_at, telling_quality
from kvbench.stats.tests import smallest_margin

MOST_NAMES = 3
_WORDS = {
    "worse": "It is worse than the full cache",
    "better": "It is better than the full cache",
    "equivalent": "It is equivalent to the full cache",
    "undecided": "Whether it keeps the full cache's quality is undecided",
}


def answer_sentences(judged: Judged) -> list[str]:
    """Return one or two sentences: what to take at the budget asked for, and what is shown to keep full's quality."""
    budget = asked_budget(judged)
    if judged.ability.sentence:
        return [judged.ability.sentence]
    if judged.primary is None or budget is None:
        return ["No cell with a budget has a quality measurement yet, so no policy can be recommended."]
    cells = judged.group.by_budget[budget]
    standing = standing_at(judged, cells, telling_quality(judged, cells) or judged.primary)
    if standing is None:
        return [f"At {budget} no cell ended well enough to be ranked, so no policy can be recommended there."]
    contrary = [line for line, clear in other_measures(judged, standing) if clear]
    but = f" But in {'; in '.join(contrary)}." if contrary else ""
    return [f"{_choice(judged, standing)} {_distance(judged, standing)}{but}", _safety(judged)]


def _choice(judged: Judged, standing: Standing) -> str:
    label, first = measure(standing.measure).label, standing.first
    name, value = judged.group.series_label(first), value_text(first, standing.measure)
    if len(standing.ranked) == 1:
        return f"At {standing.budget} only `{name}` can be judged: {label} {value}."
    if not standing.rivals:
        others = _others(judged, standing)
        return f"At {standing.budget} take `{name}`: {label} {value}, better than {others}."
    if apart := [pair for pair in standing.rivals if is_apart(pair[1])]:
        return _without_those_apart(judged, standing, apart)
    rivals = names(judged, [cell for cell, _ in standing.rivals])
    if all(found is not None and found.verdict == "equivalent" for _, found in standing.rivals):
        return f"At {standing.budget} take `{name}` ({label} {value}) or {rivals}: equivalent within the margin."
    return (
        f"At {standing.budget} the samples do not decide between `{name}` (best {label} so far, {value}) and {rivals}."
    )


def _others(judged: Judged, standing: Standing) -> str:
    """Return the beaten in words; by name where they are not all that there are."""
    count = len(standing.beaten)
    if sum(not cell.failed for cell in judged.group.by_budget[standing.budget]) > count + 1:
        return names(judged, standing.beaten)
    return f"each of the {count} other policies" if count > 1 else "the other policy"


def is_apart(found: Comparison | None) -> bool:
    """Tell whether two policies can not be compared, however many samples there are."""
    return found is None or found.verdict == "not comparable"


def _without_those_apart(
    judged: Judged, standing: Standing, apart: Sequence[tuple[CellResult, Comparison | None]]
) -> str:
    """Say who can not be compared with the first; what the samples decide is said of the others."""
    left = {cell.key for cell, _ in apart}
    others = replace(
        standing,
        ranked=tuple(cell for cell in standing.ranked if cell.key not in left),
        rivals=tuple((cell, found) for cell, found in standing.rivals if cell.key not in left),
    )
    reasons = ", ".join(dict.fromkeys(found.reason if found else "not scored alike" for _, found in apart))
    label, first = measure(standing.measure).label, standing.first
    name, value = judged.group.series_label(first), value_text(first, standing.measure)
    who = f"{names(judged, [cell for cell, _ in apart])} ({reasons})"
    if len(others.ranked) == 1:
        return f"At {standing.budget} `{name}` has the best {label} so far, {value}, but is not comparable with {who}."
    return f"{_choice(judged, others)} `{name}` is not comparable with {who}."


def _distance(judged: Judged, standing: Standing) -> str:
    found = judged.against_full(standing.first, standing.measure)
    if found is None:
        return "Its distance to the full cache was not measured."
    if found.verdict not in _WORDS:
        return f"It can not be compared with the full cache ({found.reason or found.verdict})."
    remark = verdict_remark(found)
    more = f"; {remark}" if remark else ""
    return f"{_WORDS[found.verdict]} ({difference_text(found)}{more})."


def _safety(judged: Judged) -> str:
    assert judged.primary is not None
    label = measure(judged.primary).label
    if judged.group.full is None:
        return "Without a usable cell of the full cache no policy can be shown to keep its quality."
    safe = safe_cells(judged)
    if not safe:
        open_cells = [
            cell
            for cell in judged.group.budgeted
            if (found := judged.against_full(cell, judged.primary)) and found.verdict == "undecided"
        ]
        undecided = f"; undecided: {names(judged, open_cells, with_budget=True)}" if open_cells else ""
        what = f"{label}{_margin_text(judged)}"
        return f"No policy is shown to keep the full cache's {what} at any budget measured{undecided}."
    smallest = [cell for cell in safe if cell.budget == safe[0].budget]
    return (
        f"Smallest budget measured at which the full cache's {label} is shown to be kept{_margin_text(judged)}: "
        f"{safe[0].budget}, with {names(judged, smallest)}."
    )


def _margin_text(judged: Judged) -> str:
    """Return " (margin 0.020)", and that it was chosen where it is not the declared one."""
    assert judged.primary is not None
    margin = smallest_margin(judged.primary, judged.choices.margins)
    if margin is None:
        return ""
    unit = difference_unit(judged.primary)[0]
    size = f"margin {size_text(judged.primary, margin)}{f' {unit}' if unit else ''}"
    declared = smallest_margin(judged.primary)
    other = "" if margin == declared else f", chosen for this page; declared: {size_text(judged.primary, declared)}"
    return f" ({size}{other})"


def names(judged: Judged, cells: Sequence[CellResult], *, with_budget: bool = False) -> str:
    """Return the first few cells by name, and how many more there are."""
    named = [f"`{judged.group.series_label(cell)}`" + (f" at {cell.budget}" if with_budget else "") for cell in cells]
    more = f" and {len(named) - MOST_NAMES} more" if len(named) > MOST_NAMES else ""
    shown = named[:MOST_NAMES]
    if more or len(shown) == 1:
        return ", ".join(shown) + more
    return f"{', '.join(shown[:-1])} and {shown[-1]}"


def other_measures(judged: Judged, standing: Standing) -> Iterator[tuple[str, bool]]:
    """Yield the measures in which another policy has the best value, in words, and whether that is clear."""
    for name in judged.qualities:
        if name == standing.measure:
            continue
        other = standing_at(judged, list(standing.ranked), name)
        if other is None or len(other.ranked) < 2:
            continue
        mine, best = standing.first.estimate(name), other.first.estimate(name)
        if mine is None or best is None or not is_better(name, best.value, mine.value):
            continue
        found = judged.between(other.first, standing.first, name)
        clear = found is not None and found.verdict == "better"
        words = "is better" if clear else f"has the better value, {found.verdict if found else 'not compared'}"
        values = f"{format_value(name, best.value)} against {format_value(name, mine.value)}"
        yield f"{measure(name).label} `{judged.group.series_label(other.first)}` {words} ({values})", clear


def value_text(cell: CellResult, name: str) -> str:
    """Return the cell's value with its interval."""
    found = cell.estimate(name)
    return format_with_interval(name, found.value, found.low, found.high) if found else "-"
