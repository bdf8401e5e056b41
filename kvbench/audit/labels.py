"""What the labels of a record must say, given its settings and the labels of the cells beside it.

No key covers labels, and tables show nothing else. A name that kvbench itself gives means its own class; of other
names only equal settings under different ones can be told.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from kvbench.audit.bundled import Group, rule_of, targets
from kvbench.audit.evidence import Cell, Peers, class_of

_GROUPS: tuple[Group, ...] = ("policy", "dataset")
_RULE = ("evicts_at", "budget_rounds")


def label_problems(cell: Cell, peers: Peers) -> Iterator[str]:
    """Yield a sentence for each label that settings or peers contradict."""
    labels = cell.body["labels"]
    for name, meant in _of_settings(cell).items():
        if labels.get(name) != meant:
            yield f"is labelled {name} {labels.get(name)}, its settings say {meant}"
    for name, meant in rule_of(cell).items():
        if name in labels and labels[name] != meant:
            yield f"is labelled {name} {labels[name]}, but its policy has {meant}"
    yield from _bundled(cell)
    yield from _policy(cell, peers)
    yield from _beside_others(cell, peers)


def _of_settings(cell: Cell) -> Mapping[str, Any]:
    budget = cell.setting("budget") or {}
    limits = {f"budget_{name}": budget.get(name) for name in ("fraction", "tokens")}
    return {"positions": cell.setting("positions"), "budget": _budget(budget), **limits}


def _budget(budget: Mapping[str, Any]) -> str:
    if not budget:
        return "-"
    if budget.get("tokens") is not None:
        return f"{budget['tokens']} tokens"
    return f"{100 * (budget.get('fraction') or 0):g} % of {budget.get('of')}"


def _bundled(cell: Cell) -> Iterator[str]:
    for group in _GROUPS:
        label, target = cell.body["labels"].get(group), class_of(cell.setting(group))
        meant = targets(group).get(str(label))
        if meant is not None and target != meant:
            yield f"is labelled {group} {label}, which is {meant}, but its settings say {target}"


def _policy(cell: Cell, peers: Peers) -> Iterator[str]:
    label, target = cell.body["labels"].get("policy"), class_of(cell.setting("policy"))
    found = Counter(
        class_of(other.setting("policy")) for other in peers.cells if label == other.body["labels"].get("policy")
    )
    if found[target] < max(found.values()):
        yield f"is labelled {label}, its settings say {target}, and most cells of that label another class"


def _beside_others(cell: Cell, peers: Peers) -> Iterator[str]:
    """Compare names of model and data set with those of all peers, the time of eviction with those of equal code."""
    for name in ("model", "dataset"):
        yield from _differs(cell, name, peers.cells)
    alike = [other for other in peers.cells if _code(other) == _code(cell) and other.setting("budget")]
    if cell.setting("budget"):
        yield from _differs(cell, "evicts_at", alike)


def _differs(cell: Cell, name: str, others: list[Cell] | tuple[Cell, ...]) -> Iterator[str]:
    told = Counter(str(other.body["labels"][name]) for other in others if name in other.body["labels"])
    label = cell.body["labels"].get(name)
    if name in cell.body["labels"] and str(label) != (usual := told.most_common(1)[0][0]):
        yield f"is labelled {name} {label}, and cells of the same settings {usual}"


def _code(cell: Cell) -> tuple[Any, Any]:
    return class_of(cell.setting("policy")), cell.setting("policy", "source")
