"""The page's smallest safe budgets: what `kvbench frontier` found, beside what the sweep's own budgets show."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from kvbench.frontier.table import Frontier, Look, Search, budget_text, held_text, range_text
from kvbench.measures import measure
from kvbench.report.compare import DECLARED, Ability, Choices
from kvbench.report.load import Group
from kvbench.report.markup import Head, escaped, number_cell, prose, row_head, table, text_cell
from kvbench.stats.tests import smallest_margin

_NONE = (
    "No search was made. `kvbench frontier` finds per policy the smallest budget shown to keep the full cache's "
    "quality within the margin, with few cells."
)


def frontier_html(frontiers: Sequence[Frontier], choices: Choices = DECLARED, groups: Iterable[Group] = ()) -> str:
    """Return a table per search, or how to make one.

    `choices` hold the margins of the rest of the page, `groups` the cells on it: where the full cache can not do the
    task, a search that was made before that was asked names no budget.
    """
    abilities = {cell.key: ability for group in groups for ability in (Ability(group),) for cell in group.cells}
    if not frontiers:
        return f"<p>{prose(_NONE)}</p>"
    return "".join(_one(one, choices, abilities) for one in frontiers)


def _one(frontier: Frontier, choices: Choices, abilities: Mapping[str, Ability]) -> str:
    label = measure(frontier.measure).label
    caption = f"Smallest budget at which {label} is at most {frontier.margin:g} worse than full ({frontier.name})"
    heads = [
        Head(label="policy", kind="text"),
        Head(label="model and data set", kind="text"),
        Head(label="smallest safe budget"),
        Head(label="true one", note="from - to"),
        Head(label=f"{label} minus full", note=f"at that budget, {100 * frontier.confidence:.4g} % interval"),
        Head(label="samples"),
        Head(label="budgets measured", kind=None),
    ]
    reasons = [
        ability.reason(frontier.measure) if (ability := abilities.get(search.full_key)) else ""
        for search in frontier.searches
    ]
    rows = (
        f"<tr>{''.join(_cells(frontier, search, reason))}</tr>"
        for search, reason in zip(frontier.searches, reasons, strict=True)
    )
    return (
        f"{table(caption, heads, rows)}<p class=quiet>A budget called safe is unsafe in at most 5 % of searches. "
        f"{frontier.num_cells} cells were measured instead of {frontier.num_cells_of_grid} of the dense grid, "
        f"by {escaped(frontier.budget_setting)}.{_other_margin(frontier, choices)}</p>"
    )


def _other_margin(frontier: Frontier, choices: Choices) -> str:
    """Say why the answer on top may name another budget."""
    elsewhere = smallest_margin(frontier.measure, choices.margins)
    if elsewhere is None or elsewhere == frontier.margin:
        return ""
    return (
        f" The margin here is {frontier.margin:g} and in the answer and the verdicts {elsewhere:g}, "
        "so they may name another budget."
    )


def _cells(frontier: Frontier, search: Search, withheld: str) -> Iterator[str]:
    positions = "" if search.positions == "original" else search.positions
    yield row_head(search.policy, positions)
    yield text_cell(f"{search.model} on {search.dataset}")
    if withheld:
        yield number_cell("not ranked", withheld, value=1e18)
        yield from (number_cell("-", value=None) for _ in range(3))
        yield text_cell(", ".join(budget_text(frontier, one.budget) for one in search.looks))
        return
    safe = search.smallest_safe
    above = f"none up to {budget_text(frontier, max(frontier.ladder))}" if safe is None else budget_text(frontier, safe)
    below = held_text(frontier, search) if search.status == "found" else search.status
    yield number_cell(above, below, value=1e18 if safe is None else safe)
    yield number_cell(range_text(frontier, search), value=search.budget_low)
    look = search.look or (search.looks[-1] if search.looks else None)
    yield number_cell("-" if look is None else _difference(look), value=None if look is None else look.value)
    yield number_cell("-" if look is None else str(look.num_samples), value=None if look is None else look.num_samples)
    seen = ", ".join(f"{budget_text(frontier, one.budget)} {one.outcome}" for one in search.looks)
    yield text_cell(seen)


def _difference(look: Look) -> str:
    if look.value is None or look.low is None or look.high is None:
        return look.reason or "-"
    return f"{look.value:+.3f} [{look.low:+.3f}, {look.high:+.3f}]"
