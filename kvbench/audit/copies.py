"""R13: no two cells hold the same answers and likelihoods to the last digit.

Two settings that do the same thing give equal rows too. Cells in which nothing was evicted are left out, and so
are equal policies in equal caches; what remains is worth a second look even if it is honest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import lru_cache

from kvbench.audit.check import Check
from kvbench.audit.evidence import Cell, Peers
from kvbench.results.files import canonical_json

_COMPARED = ("nll_sum", "kl_sum", "text", "turn1_text", "released_nll_sum")


def _problems(cell: Cell, peers: Peers) -> Iterator[str]:
    twins = [other for other in _by_content(peers)[_content(cell)] if other is not cell]
    if twins:
        yield f"its answers and likelihoods are those of {twins[0].name} to the last digit"


@lru_cache(maxsize=8)
def _by_content(peers: Peers) -> dict[str, list[Cell]]:
    found: dict[str, list[Cell]] = {}
    for cell in peers.usable:
        if _evicts(cell):
            found.setdefault(_content(cell), []).append(cell)
    return found


def _content(cell: Cell) -> str:
    rows = [{name: row.get(name) for name in ("id", *_COMPARED)} for row in cell.samples]
    return hashlib.sha256(canonical_json(sorted(rows, key=lambda row: str(row["id"]))).encode()).hexdigest()


def _evicts(cell: Cell) -> bool:
    share = cell.value("realised_budget_fraction")
    return bool(cell.setting("budget")) and bool(cell.samples) and (share is None or share < 1)


COPIES_CHECK = Check(
    id="R13",
    title="no cell's samples are another cell's",
    meaning="samples were copied from another policy or budget, or two settings do the same thing",
    applies=lambda cell, peers: cell.usable and _evicts(cell),
    problems=_problems,
)
