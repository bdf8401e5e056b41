"""R9: what is evicted is freed, not only masked: nothing is said about the memory or speed of a mask.

A policy that only hides entries stores all of them and reads all of them; its bytes and milliseconds are not
those of eviction.
"""

from __future__ import annotations

from collections.abc import Iterator

from kvbench.audit.budget_rule import kind_of
from kvbench.audit.check import Check
from kvbench.audit.evidence import Cell, Peers
from kvbench.audit.kv_bytes import full_bytes, shortest_tokens

_SPARE_SLOTS = 4  # the free slot, and what a growing share of one launch may reserve
_SPARE_SLOTS_OF_GROWTH = 66  # a policy that keeps what it generates reserves slots in advance
_SPARE_SHARE = 0.25
_COST = ("kv_stored_bytes", "tpot_ms", "peak_memory_bytes")


def _problems(cell: Cell, peers: Peers) -> Iterator[str]:
    if _simulated(cell) and (told := [name for name in _COST if cell.value(name) is not None]):
        yield f"its eviction is simulated, and yet {told[0]} is told"
        return
    stored, most = cell.value("kv_stored_bytes"), _most_bytes(cell, peers)
    if stored is not None and most is not None and stored > most:
        yield f"{stored:g} bytes are stored, where the budget and its spare slots take {most:.6g}: masked, not freed?"


def _most_bytes(cell: Cell, peers: Peers) -> float | None:
    """Return what budget and spare slots take; None where no full cache tells what a slot takes."""
    full, shortest, theory = full_bytes(cell, peers), shortest_tokens(peers), cell.value("kv_theoretical_bytes")
    if full is None or theory is None:
        return None
    if shortest is None:  # no step was logged: a slot is small where costs alone are measured
        return theory + _SPARE_SHARE * full if cell.body["labels"].get("evicts_at") == "prompt and decode" else None
    slots = _SPARE_SLOTS if kind_of(cell) in ("everything", "both", "rounds up") else _SPARE_SLOTS_OF_GROWTH
    return theory + slots * full / shortest


def _simulated(cell: Cell) -> bool:
    names = ("simulated", "masked", "mask_only")
    return any(cell.setting("policy", name) is True or cell.body["labels"].get(name) is True for name in names)


FREED_CHECK = Check(
    id="R9",
    title="what is evicted is freed; no cost is told of a mask",
    meaning="entries were hidden and not freed, so memory and speed are not those of eviction",
    applies=lambda cell, peers: cell.usable and (_most_bytes(cell, peers) is not None or _simulated(cell)),
    problems=_problems,
)
