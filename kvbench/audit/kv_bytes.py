"""A6: the bytes claimed for the cache are those that budget and full cache imply, and fit under the peaks."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from kvbench.audit.budget_rule import entries_curve, kind_of
from kvbench.audit.check import Check
from kvbench.audit.evidence import Cell, Peers

_PHASES = tuple(f"peak_{phase}_bytes" for phase in ("vision", "prefill", "settle", "decode"))


def _problems(cell: Cell, peers: Peers) -> Iterator[str]:
    stored, valid, theory = (cell.value(f"kv_{kind}_bytes") for kind in ("stored", "valid", "theoretical"))
    if stored is None or valid is None or theory is None:
        yield "kv_stored_bytes, kv_valid_bytes and kv_theoretical_bytes are not all there"
        return
    if not 0 < valid <= stored:
        yield f"{valid:g} bytes are in use, but {stored:g} are stored"
    if valid > theory:
        yield f"{valid:g} bytes are in use, the budget allows {theory:g}"
    yield from _peaks(cell, stored)
    full = full_bytes(cell, peers)
    if full is not None:
        low, high = allowed_share(cell, peers)
        if not low <= theory / full <= high:
            yield (
                f"its budget is said to be {theory:g} bytes, {100 * theory / full:.1f} % of the full cache's, "
                f"where {100 * low:.1f} to {100 * high:.1f} % are possible"
            )
        if valid / full < low - 1e-9 and kind_of(cell) in ("everything", "both"):
            yield f"{valid:g} bytes in use are {100 * valid / full:.1f} % of the full cache's, too few for its entries"


def _peaks(cell: Cell, stored: float) -> Iterator[str]:
    phases = [value for name in _PHASES if (value := cell.value(name)) is not None]
    peak, load, decode = (cell.value(f"peak_{name}_bytes") for name in ("memory", "load", "decode"))
    if peak is not None and phases and peak != max(phases):
        yield f"peak_memory_bytes is {peak:g}, the largest phase has {max(phases):g}"
    if decode is not None and load is not None and decode < load + stored:
        yield f"the peak while decoding is {decode:g} bytes, weights and stored entries alone are {load + stored:g}"
    ratio, activations = cell.value("peak_over_bound_ratio"), cell.value("plain_activation_bytes")
    theory = cell.value("kv_theoretical_bytes")
    if None not in (peak, load, ratio, activations, theory):
        assert peak and load and ratio is not None and activations is not None and theory is not None  # noqa: PT018
        if ratio > peak / (load + activations + theory) * (1 + 1e-9):
            yield f"peak_over_bound_ratio is {ratio:.4g}, more than peak over weights, activations and entries"


def full_bytes(cell: Cell, peers: Peers) -> float | None:
    """Return what the full cache's entries take in the same memory pass, None if it was not measured."""
    full = peers.full
    if full is None or full.task("Memory") != cell.task("Memory"):
        return None
    return full.value("kv_theoretical_bytes")


@lru_cache(maxsize=8)
def shortest_tokens(peers: Peers) -> float | None:
    """Return the fewest tokens seen at a logged step of any cell, None if no step was logged."""
    firsts = [rows[0][0] for other in peers.usable if (rows := entries_curve(other))]
    return min(firsts) if firsts else None


@lru_cache(maxsize=8)
def _longest_tokens(peers: Peers) -> float:
    return max((row[0] for other in peers.usable for row in entries_curve(other)), default=0)


def allowed_share(cell: Cell, peers: Peers) -> tuple[float, float]:
    """Return the least and the largest share of the full cache's bytes that the budget can be."""
    budget, shortest = cell.setting("budget"), shortest_tokens(peers)
    if not budget:
        return 1.0, 1.0
    steps = (cell.task("Memory") or {}).get("new_tokens", 1)
    longest = _longest_tokens(peers) + steps
    if budget.get("tokens") is not None:
        least = min(1.0, budget["tokens"] / longest) if shortest else 0.0  # a budget never reached is the full cache
        return least, max(1.0, budget["tokens"] / (shortest or 1))
    fraction = float(budget["fraction"])
    if shortest is None:
        return fraction / 2, 1.0  # rounded down from at least one entry, a share is more than half of itself
    of_prompt = 1.0 if budget.get("of") == "seen" else (shortest - 1) / (shortest - 1 + steps)
    most = 1.0 if kind_of(cell) in ("prompt only", "decode only") else fraction + 1 / shortest
    return fraction * of_prompt - 1 / shortest, most


BYTES_CHECK = Check(
    id="A6",
    title="bytes of the cache follow from budget and full cache",
    meaning="the memory saved was not saved, or bytes were changed after the run",
    applies=lambda cell, peers: any(cell.value(f"kv_{kind}_bytes") is not None for kind in ("stored", "valid")),
    problems=_problems,
)
