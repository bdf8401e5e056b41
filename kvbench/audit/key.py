"""A5: the key recomputed from the stored settings, and labels that say what the settings say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from kvbench.audit.check import Check
from kvbench.audit.evidence import Cell, Peers
from kvbench.records import cell_key


def _problems(cell: Cell, peers: Peers) -> Iterator[str]:
    computed = cell_key(cell.settings)
    if computed != cell.body["key"]:
        yield f"the settings give the key {computed[:8]}, the record says {cell.body['key'][:8]}"
    if cell.folder != cell.body["key"][:16]:
        yield f"lies in the folder {cell.folder}, its key begins with {cell.body['key'][:16]}"
    labels = cell.body["labels"]
    if labels.get("positions") != cell.setting("positions"):
        yield f"is labelled positions={labels.get('positions')}, its settings say {cell.setting('positions')}"
    said, meant = labels.get("budget"), _budget(cell)
    if said != meant:
        yield f"is labelled budget {said}, its settings say {meant}"
    yield from _policy(cell, peers)


def _budget(cell: Cell) -> str:
    budget = cell.setting("budget")
    if not budget:
        return "-"
    if budget.get("tokens") is not None:
        return f"{budget['tokens']} tokens"
    return f"{100 * (budget.get('fraction') or 0):g} % of {budget.get('of')}"


def _policy(cell: Cell, peers: Peers) -> Iterator[str]:
    label, target = cell.body["labels"].get("policy"), cell.setting("policy", "_target_")
    if cell.is_full and target != "kvbench.policies.full.Full":
        yield f"is labelled full, its settings say {target}"
    targets = Counter(other.setting("policy", "_target_") for other in peers.cells if label == _label(other))
    if targets[target] < max(targets.values()):
        yield f"is labelled {label}, its settings say {target}, and most cells of that label another class"


def _label(cell: Cell) -> object:
    return cell.body["labels"].get("policy")


CHECK = Check(
    id="A5",
    title="the key follows from the settings, the labels too",
    meaning="settings, key or labels were changed: the numbers belong to another setting than the one shown",
    applies=lambda cell, peers: True,
    problems=_problems,
)
