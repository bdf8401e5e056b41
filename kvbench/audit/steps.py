"""How many decode steps the answers of a cell took: at each of them every layer's entries are counted."""

from __future__ import annotations

from kvbench.audit.evidence import Cell

ENTRIES = ("realised_budget_fraction", "entries_mean", "entries_peak")


def steps_taken(cell: Cell) -> int:
    """Return the steps of all rows; a token that no end follows is the last one and takes none."""
    most = (cell.task("Generation") or {}).get("max_new_tokens", 0)
    return sum(max(0, min(row.get("num_new_tokens") or 0, most - 1)) for row in cell.samples)
