"""The page's smallest safe budgets: what `kvbench frontier` found, beside what the sweep's own budgets show."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from markupsafe import Markup

from kvbench.frontier.table import Frontier, Look, Search, budget_text, held_text, range_text
from kvbench.measures import measure
from kvbench.report.ability import Ability
from kvbench.report.compare import DECLARED, Choices
from kvbench.report.load import Group
from kvbench.report.markup import Head, TableCell, TableView, render, row_head, text_cell
from kvbench.stats.tests import smallest_margin


def frontier_html(frontiers: Sequence[Frontier], choices: Choices = DECLARED, groups: Iterable[Group] = ()) -> Markup:
    """Return a table per search, or how to make one.

    `choices` hold the margins of the rest of the page, `groups` the cells on it: where the full cache can not do the
    task, a search that was made before that was asked names no budget.
    """
    abilities = {cell.key: ability for group in groups for ability in (Ability(group),) for cell in group.cells}
    drawn = []
    for frontier in frontiers:
        label = measure(frontier.measure).label
        heads = [
            Head("policy", kind="text"),
            Head("model and data set", kind="text"),
            Head("smallest safe budget"),
            Head("true one", "from - to"),
            Head(f"{label} minus full", f"at that budget, {100 * frontier.confidence:.4g} % interval"),
            Head("samples"),
            Head("budgets measured", kind=None),
        ]
        rows = []
        for search in frontier.searches:
            ability = abilities.get(search.full_key)
            withheld = ability.reason(frontier.measure) if ability else ""
            rows.append(list(_cells(frontier, search, withheld)))
        caption = f"Smallest budget at which {label} is at most {frontier.margin:g} worse than full ({frontier.name})"
        elsewhere = smallest_margin(frontier.measure, choices.margins)
        other_margin = None if elsewhere == frontier.margin else elsewhere
        view = TableView(caption=caption, heads=heads, rows=rows)
        drawn.append({"frontier": frontier, "view": view, "other_margin": other_margin})
    return render("frontier.html.j2", searches=drawn)


def _cells(frontier: Frontier, search: Search, withheld: str) -> Iterator[TableCell]:
    yield row_head(search.policy, "" if search.positions == "original" else search.positions)
    yield text_cell(f"{search.model} on {search.dataset}")
    if withheld:
        yield TableCell("not ranked", withheld, sort=1e18)
        yield from [TableCell("-")] * 3
        yield text_cell(", ".join(budget_text(frontier, one.budget) for one in search.looks))
        return
    safe = search.smallest_safe
    above = f"none up to {budget_text(frontier, max(frontier.ladder))}" if safe is None else budget_text(frontier, safe)
    below = held_text(frontier, search) if search.status == "found" else search.status
    yield TableCell(above, below, sort=1e18 if safe is None else safe)
    yield TableCell(range_text(frontier, search), sort=search.budget_low)
    look = search.look or (search.looks[-1] if search.looks else None)
    if look is None:
        yield from [TableCell("-")] * 2
    else:
        yield TableCell(_difference(look), sort=look.value)
        yield TableCell(str(look.num_samples), sort=look.num_samples)
    yield text_cell(", ".join(f"{budget_text(frontier, one.budget)} {one.outcome}" for one in search.looks))


def _difference(look: Look) -> str:
    if look.value is None or look.low is None or look.high is None:
        return look.reason or "-"
    return f"{look.value:+.3f} [{look.low:+.3f}, {look.high:+.3f}]"
