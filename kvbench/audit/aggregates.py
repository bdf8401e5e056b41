"""R6: every quality number follows from the samples, with the number of samples it says."""

from __future__ import annotations

from collections.abc import Iterator

from kvbench.audit.check import Check
from kvbench.audit.evidence import Cell, Peers
from kvbench.audit.recomputed import from_samples, tolerance
from kvbench.errors import MeasureError


def _problems(cell: Cell, peers: Peers) -> Iterator[str]:
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


CHECK = Check(
    id="R6",
    title="every number follows from its samples",
    meaning="a result was changed, or samples were changed after it was computed",
    applies=lambda cell, peers: cell.usable and bool(cell.samples),
    problems=_problems,
)
