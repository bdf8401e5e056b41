"""A5: the key recomputed from the stored settings, and labels that say what the settings say."""

from __future__ import annotations

from collections.abc import Iterator

from kvbench.audit.check import Check
from kvbench.audit.evidence import Cell, Peers
from kvbench.audit.labels import label_problems
from kvbench.results.record import cell_key


def _problems(cell: Cell, peers: Peers) -> Iterator[str]:
    computed = cell_key(cell.settings, cell.body["schema"])
    if computed != cell.body["key"]:
        yield f"the settings give the key {computed[:8]}, the record says {cell.body['key'][:8]}"
    if cell.folder != cell.body["key"][:16]:
        yield f"lies in the folder {cell.folder}, its key begins with {cell.body['key'][:16]}"
    yield from label_problems(cell, peers)


KEY_CHECK = Check(
    id="A5",
    title="the key follows from the settings, the labels too",
    meaning="settings, key or labels were changed: the numbers belong to another setting than the one shown",
    applies=lambda cell, peers: True,
    problems=_problems,
)
