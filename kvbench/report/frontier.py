"""Results of `kvbench frontier`: per policy the smallest budget shown to be as good as full, as files and as a table.

for search in load_frontier(Path("results/frontier/mine.json")).searches:
    print(search.policy, search.status, search.smallest_safe, search.budget_low)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from kvbench.errors import RecordError
from kvbench.frontier_file import KIND, VERSION
from kvbench.results.files import replace_file, seal, unseal

Outcome = Literal["safe", "worse", "undecided", "failed"]
SearchStatus = Literal["found", "every budget is safe", "no budget shown safe", "not monotone"]


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
        made = _made(Frontier, body | {"searches": searches, "ladder": tuple(body["ladder"])})
    except (KeyError, TypeError) as error:
        raise RecordError(f"{path} lacks a part of a frontier ({error!s:.80}); run the same command again.") from error
    frontier: Frontier = made
    return frontier


def _made(kind: type[Any], values: Mapping[str, Any]) -> Any:
    return kind(**{field.name: values[field.name] for field in fields(kind)})
