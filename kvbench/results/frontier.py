"""What `kvbench frontier` found: per policy the smallest budget shown to be as good as full, as files and as a table.

    for search in load_frontier(Path("results/frontier/mine.json")).searches:
        print(search.policy, search.status, search.smallest_safe, search.budget_low)

The files are sealed, and `kvbench results verify` checks them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvbench.errors import RecordError
from kvbench.measures import measure
from kvbench.results.files import replace_file, seal, unseal

KIND, VERSION = "kvbench_frontier", 1
Outcome = Literal["safe", "worse", "undecided", "failed"]
SearchStatus = Literal["found", "every budget is safe", "no budget shown safe", "not monotone"]
_WORDS = {
    "every budget is safe": "the smallest budget of the ladder is safe already",
    "no budget shown safe": "not even the largest budget was shown to be safe",
    "not monotone": "a larger budget was worse than a smaller one",
}
_MORE = 0.01


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """One measured budget: the difference to full with the interval of this search, and what it shows.

    safe: the interval stays inside the margin; worse: it lies beyond the margin; `reason` says why one failed.
    `realised_budget` is the share of the tokens really held; a policy that never drops new tokens holds more.
    """

    budget: float
    outcome: Outcome
    key: str | None = None
    value: float | None = None
    low: float | None = None
    high: float | None = None
    num_samples: int = 0
    num_clusters: int = 0
    minimum_detectable: float | None = None
    realised_budget: float | None = None
    reason: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Search:
    """One policy's search. `smallest_safe` is None where no budget was shown to be safe.

    The true smallest safe rung lies from `budget_low` (the rung above the largest that was shown to be worse;
    None above the ladder) to `smallest_safe`; `look` is the one at `smallest_safe`.
    """

    model: str
    dataset: str
    policy: str
    positions: str
    policy_settings: Mapping[str, Any]
    full_key: str
    status: SearchStatus
    smallest_safe: float | None
    budget_low: float | None
    looks: tuple[Look, ...]

    @property
    def look(self) -> Look | None:
        """Return what was seen at the smallest safe budget."""
        return next((look for look in self.looks if look.budget == self.smallest_safe), None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Frontier:
    """All searches of one command. `confidence` is the two-sided one of a look; the answers' together is 95 % each."""

    name: str
    measure: str
    margin: float
    ladder: tuple[float, ...]
    budget_setting: str
    confidence: float
    num_cells: int
    num_cells_of_grid: int
    searches: tuple[Search, ...]


def save_frontier(results: Path, frontier: Frontier) -> Path:
    """Write results/frontier/NAME.json, whole or not at all; the same searches give the same bytes."""
    path = results / "frontier" / f"{frontier.name}.json"
    data = seal(KIND, VERSION, asdict(frontier))
    if path.is_file() and path.read_bytes() == data:
        return path
    replace_file(path, data)
    return path


def load_frontier(path: Path) -> Frontier:
    """Return the frontier at `path`. Raises: RecordError naming the path if it is damaged, foreign or too new."""
    body = unseal(path, KIND, VERSION, "Delete it and run the same command again; its cells are not measured again.")
    try:
        searches = tuple(
            _made(Search, one | {"looks": tuple(_made(Look, look) for look in one["looks"])})
            for one in body["searches"]
        )
        frontier: Frontier = _made(Frontier, body | {"searches": searches, "ladder": tuple(body["ladder"])})
    except (KeyError, TypeError) as error:
        raise RecordError(f"{path} lacks a part of a frontier ({error!s:.80}); run the same command again.") from error
    return frontier


def _made(kind: type[Any], values: Mapping[str, Any]) -> Any:
    return kind(**{field.name: values[field.name] for field in fields(kind)})


def print_frontier(frontier: Frontier, console: Console | None = None) -> None:
    """Print one line per policy: smallest safe budget, where it may lie, the difference there, budgets measured."""
    console = console or Console()
    label = measure(frontier.measure).label
    title = Text(f"Smallest budget at which {label} is at most {frontier.margin:g} worse than full")
    table = Table(title=title, title_justify="left", box=box.HORIZONTALS, padding=(0, 1, 0, 0))
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


def _row(frontier: Frontier, search: Search) -> Iterator[Text]:
    seen = "\n".join(f"{budget_text(frontier, look.budget)} {look.outcome}" for look in search.looks)
    shown = search.look or (search.looks[-1] if search.looks else None)
    difference = (shown and difference_of(shown)) or "-"
    yield from map(Text, (search.policy, _upper(frontier, search), range_text(frontier, search), difference, seen))


def difference_of(look: Look) -> str:
    """Return "-0.012 [-0.019, -0.006]"; empty where nothing could be compared."""
    if look.value is None or look.low is None or look.high is None:
        return ""
    return f"{look.value:+.3f} [{look.low:+.3f}, {look.high:+.3f}]"


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
