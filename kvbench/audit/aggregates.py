"""R6: every quality number follows from the samples, with the number of samples it says, and all are there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import lru_cache

from kvbench.audit.check import Check
from kvbench.audit.evidence import Cell, Peers
from kvbench.audit.recomputed import from_samples, tolerance
from kvbench.errors import MeasureError
from kvbench.measures import MEASURES
from kvbench.results.files import canonical_json


def _problems(cell: Cell, peers: Peers) -> Iterator[str]:
    yield from _not_there(cell, peers)
    for name in sorted(cell.body["measurements"]):
        try:
            found = from_samples(cell, name)
        except MeasureError as error:
            yield f"{name} cannot be computed from the samples: {error}"
            continue
        if found is None:
            continue
        stored = cell.value(name)
        if (stored is None) != (found.value is None):
            yield f"{name} is {stored}, the samples give {found.value}"
        elif stored is not None and found.value is not None:
            if abs(stored - found.value) > max(1e-12, tolerance(cell, name) * abs(found.value)):
                yield f"{name} is {stored:.6g}, the samples give {found.value:.6g}"
            elif (n := cell.number(name, "n")) != found.n:
                yield f"{name} says n = {n}, the samples give {found.n}"


def _not_there(cell: Cell, peers: Peers) -> Iterator[str]:
    """Say what samples give, or those of other cells with the same tasks, and this cell does not tell."""
    told, given = cell.body["measurements"], _scores(cell)
    for name in sorted(given - set(told)):
        yield f"{name} is not there, though its samples give it"
    for name in sorted(_usual(peers, canonical_json(cell.setting("task"))) - given):
        yield f"{name} is not there, though the samples of cells with the same tasks give it"


@lru_cache(maxsize=65536)
def _scores(cell: Cell) -> frozenset[str]:
    """Return the measurements that are means over samples, as its rows name them."""
    return frozenset(name for row in cell.samples for name in row if name in MEASURES)


@lru_cache(maxsize=64)
def _usual(peers: Peers, task: str) -> frozenset[str]:
    """Return what at least half of the cells with the same tasks score."""
    alike = [one for one in peers.usable if one.samples and canonical_json(one.setting("task")) == task]
    counts = Counter(name for one in alike for name in _scores(one))
    return frozenset(name for name, count in counts.items() if 2 * count >= len(alike))


AGGREGATES_CHECK = Check(
    id="R6",
    title="every number follows from its samples",
    meaning="a result was changed, or samples were changed after it was computed",
    applies=lambda cell, peers: cell.usable and bool(cell.samples),
    problems=_problems,
)
