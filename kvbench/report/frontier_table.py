"""The table of a frontier in the terminal."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvbench.measures import measure
from kvbench.report.frontier import Frontier, Search

_WORDS = {
    "every budget is safe": "the smallest budget of the ladder is safe already",
    "no budget shown safe": "not even the largest budget was shown to be safe",
    "not monotone": "a larger budget was worse than a smaller one",
}
_MORE = 0.01


def print_frontier(frontier: Frontier, console: Console | None = None) -> None:
    """Print one line per policy: smallest safe budget, where it may lie, the difference there, budgets measured."""
    console = console or Console()
    label = measure(frontier.measure).label
    table = Table(
        title=Text(f"Smallest budget at which {label} is at most {frontier.margin:g} worse than full"),
        title_justify="left",
        box=box.HORIZONTALS,
        padding=(0, 1, 0, 0),
    )
    for head in ("policy", "smallest safe\nbudget", "true one\nfrom - to", f"{label}\nminus full", "budgets measured"):
        table.add_column(head, justify="left" if head in ("policy", "budgets measured") else "right")
    for search in frontier.searches:
        table.add_row(*_row(frontier, search))
    console.print(table)
    for search in frontier.searches:
        if held := held_text(frontier, search):
            console.print(Text(f"{search.policy}: at {budget_text(frontier, search.smallest_safe or 0)} it {held}"))
        if search.status in _WORDS:
            console.print(Text(f"{search.policy}: {_WORDS[search.status]}{_advice(search)}"))
    looks = f"each of at most {len(frontier.ladder).bit_length()} looks at {frontier.confidence:.4g}"
    console.print(Text(f"A budget called safe is unsafe in at most 5 % of searches ({looks} two-sided)."))
    console.print(Text(f"{frontier.num_cells} cells instead of {frontier.num_cells_of_grid} of the dense grid."))


def budget_text(frontier: Frontier, budget: float) -> str:
    """Return "20 %" for a share and "64" for a number of tokens."""
    return f"{100 * budget:g} %" if frontier.budget_setting == "fraction" else f"{budget:g}"


def _row(frontier: Frontier, search: Search) -> tuple[Text, ...]:
    found, upper = search.look, _upper(frontier, search)
    seen = "\n".join(f"{budget_text(frontier, look.budget)} {look.outcome}" for look in search.looks)
    shown = found or (search.looks[-1] if search.looks else None)
    difference = "-"
    if shown is not None and shown.value is not None and shown.low is not None and shown.high is not None:
        difference = f"{shown.value:+.3f} [{shown.low:+.3f}, {shown.high:+.3f}]"
    texts = (search.policy, upper, range_text(frontier, search), difference, seen)
    return tuple(Text(text) for text in texts)


def range_text(frontier: Frontier, search: Search) -> str:
    """Return where the smallest safe budget lies, as far as the looks say: "70 % - 80 %"."""
    upper = _upper(frontier, search)
    if search.status == "every budget is safe":
        return f"at most {upper}"
    return upper if search.budget_low is None else f"{budget_text(frontier, search.budget_low)} - {upper}"


def held_text(frontier: Frontier, search: Search) -> str:
    """Say so where a policy holds more than its budget, as one that never drops new tokens does."""
    look = search.look
    if frontier.budget_setting != "fraction" or look is None or look.realised_budget is None:
        return ""
    return f"held {look.realised_budget:.1%} of the tokens" if look.realised_budget >= look.budget + _MORE else ""


def _upper(frontier: Frontier, search: Search) -> str:
    safe = search.smallest_safe
    return f"above {budget_text(frontier, max(frontier.ladder))}" if safe is None else budget_text(frontier, safe)


def _advice(search: Search) -> str:
    """Say what would decide where the samples, not the policy, are the reason."""
    last = search.looks[-1] if search.looks else None
    if search.status != "no budget shown safe" or last is None or last.outcome != "undecided":
        return ""
    smallest = last.minimum_detectable or 0.0
    return f"; with {last.num_samples} samples a difference under {smallest:.3f} is not seen, take more"
