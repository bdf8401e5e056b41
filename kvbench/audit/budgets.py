"""A6, A7, R9: entries and bytes that a budget allows, for policies that cut the prompt, the decode, or both.

A record says the kind of its policy (labels evicts_at and budget_rounds). Where it does not, the kind is read from the
curve of entries, as far as the policy, if it is one of kvbench's own, can be of that kind; a curve that fits
none from its first to its last step is over budget. No kind that cuts only at decode holds less than a prompt.

A policy that only hides entries stores and reads all of them: its bytes and milliseconds are not those of eviction.

The rule of the budget stands here a second time on purpose, from the definition and not from `kvbench.cache`: an audit
that asked the cache what it may hold would believe it (and would load torch).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

from kvbench.audit.evidence import Cell, Note, Peers, answers_in, check, rule_of

Kind = Literal["everything", "both", "rounds up", "prompt only", "decode only", "none"]
ENTRIES = ("realised_budget_fraction", "entries_mean", "entries_peak")
_DECIMALS = 9  # 0.29 * 100 is 28.999999999999996; the user meant 29
_KINDS: dict[object, Kind] = {"prompt and decode": "both", "prompt": "prompt only", "decode": "decode only"}
_NOT_SHOWN_BY: dict[object, tuple[Kind, ...]] = {
    "prompt and decode": ("prompt only", "decode only"),
    "prompt": ("decode only",),
}
_DIVIDES = ("allocation", "skip_layers")
_ROUNDING = 1e-9
_PHASES = tuple(f"peak_{phase}_bytes" for phase in ("vision", "prefill", "settle", "decode"))
_SPARE_SLOTS = 4  # the free slot, and what a growing share of one launch may reserve
_SPARE_SLOTS_OF_GROWTH = 66  # a policy that keeps what it generates reserves slots in advance
_SPARE_SHARE = 0.25
_COST = ("kv_stored_bytes", "tpot_ms", "peak_memory_bytes")
_Rows = Sequence[Sequence[float]]


@lru_cache(maxsize=65536)
def entries_curve(cell: Cell) -> list[list[float]]:
    """Return [seen, mean, peak] of every logged step."""
    return cell.curve("entries", 3)


@lru_cache(maxsize=65536)
def budgeted_curve(cell: Cell) -> list[list[float]]:
    """Return [seen, mean, most] of every logged step, where `most` is what the budget bounds.

    That is the fullest head, or the mean where a policy divides the same total unevenly; and a policy that plans in
    blocks may hold all of a block but its last token beyond the budget.
    """
    divides, spare = any(cell.setting("policy", part) for part in _DIVIDES), block_tokens(cell) - 1
    rows = ((seen, mean, mean if divides else peak) for seen, mean, peak in entries_curve(cell))
    return [[seen, mean, max(most - spare, min(most, 1.0))] for seen, mean, most in rows]


def is_outcome(cell: Cell) -> bool:
    """Whether the allocation of a policy makes what is held an outcome that no budget bounds."""
    return cell.label("budget_total") == "data_dependent" and bool(cell.setting("policy", "allocation"))


def block_tokens(cell: Cell) -> int:
    """Return how many generated tokens come before a plan."""
    asked = cell.setting("policy", "every_tokens")
    return asked if isinstance(asked, int) and asked > 1 else 1


def steps_taken(cell: Cell) -> int:
    """Return the steps of all rows, at each of which every layer's entries are counted.

    A token that no end follows is the last one and takes none.
    """
    most = (cell.task("Generation") or {}).get("max_new_tokens", 0)
    answers = [answer for row in cell.samples for answer in answers_in(row)]
    return sum(max(0, min(answer.get("num_new_tokens") or 0, most - 1)) for answer in answers)


def allowed_entries(budget: Mapping[str, Any], seen: float, *, up: bool = False, of_prompt: bool = False) -> int:
    """Return what the budget allows after `seen` tokens; of a prompt's share, the most any prompt before allows.

    of_prompt: `seen` is the whole prompt. up: rounded up in floating point, as Elastic Cache's code does:
    of 160 tokens 1 - 0.7 are 49.
    """
    if budget.get("tokens") is not None:
        return int(budget["tokens"])
    base = seen if of_prompt or budget.get("of") == "seen" else seen - 1
    fraction = float(budget["fraction"])
    if up:
        return max(1, math.ceil(base * (1 - round(1 - fraction, _DECIMALS))))
    return max(1, math.floor(round(fraction * base, _DECIMALS)))


@lru_cache(maxsize=65536)
def kind_of(cell: Cell) -> Kind:
    """Return the kind whose rule every step keeps; "none" if there is no such kind."""
    rows, budget = budgeted_curve(cell), cell.setting("budget")
    if not budget:
        return "everything" if all(mean == peak == seen for seen, mean, peak in rows) else "none"
    kind = _KINDS.get(cell.label("evicts_at"))
    if kind is None:
        shown = _shown_by(budget, rows)
        return "none" if shown in _NOT_SHOWN_BY.get(rule_of(cell).get("evicts_at"), ()) else shown
    # What holds less than a prompt cut it, whatever the label says.
    if kind == "decode only" and any(mean < rows[0][0] - 1 - _ROUNDING for _, mean, _ in rows):
        kind = "both"
    up = cell.label("budget_rounds") == "up"
    if up and kind == "both":
        kind = "rounds up"
    return kind if all(row[2] <= _most(kind, budget, rows, row[0], up) for row in rows) else "none"


def _most(kind: Kind, budget: Mapping[str, Any], rows: _Rows, seen: float, up: bool) -> float:
    """Return the most entries that a row may hold after `seen` tokens; the shortest prompt bounds the others."""
    allowed, prompt = allowed_entries(budget, seen, up=up), rows[0][0] - 1
    if kind == "prompt only":
        return min(prompt, allowed_entries(budget, prompt, up=up, of_prompt=True)) + seen - prompt
    return max(allowed, seen - 1) if kind == "decode only" else allowed


def _shown_by(budget: Mapping[str, Any], rows: _Rows) -> Kind:
    """Return the kind that the curve shows, for records that do not say it."""
    over = [row for row in rows if row[2] > allowed_entries(budget, row[0])]
    if not over:
        return "both"
    # Rounded up it is always one more than rounded down, not now and then.
    differs = [row for row in rows if allowed_entries(budget, row[0]) != allowed_entries(budget, row[0], up=True)]
    if 2 * len(over) > len(differs) and all(row[2] <= allowed_entries(budget, row[0], up=True) for row in rows):
        return "rounds up"
    # Within the budget after the prompt, and then at most one more per token, at most steps.
    first_seen, _, first = rows[0]
    grows = all(row[2] <= first + row[0] - first_seen for row in rows) and 2 * len(over) > len(rows)
    if grows and first <= allowed_entries(budget, first_seen - 1, up=True) + 1:
        return "prompt only"
    return "decode only" if first == first_seen - 1 and all(peak <= seen - 1 for seen, _, peak in rows) else "none"


@check(
    "A7",
    "the budget is kept at every logged step",
    "the policy held more entries than it says",
    lambda cell, peers: (
        cell.usable
        and (
            any(cell.value(name) is not None for name in ENTRIES)
            or bool(cell.body["curves"].get("entries"))
            or steps_taken(cell) > 0
        )
    ),
)
def budget(cell: Cell, peers: Peers) -> Iterator[str]:
    """Compare every logged step with the budget, and the numbers told with the steps."""
    rows = entries_curve(cell)
    if odd := cell.num_odd_rows("entries", 3):
        yield f"{odd} logged steps are not three numbers"
    if not rows:
        yield "steps were taken, and none is logged"
        return
    if is_outcome(cell):
        held = 100 * (cell.value("realised_budget_fraction") or 0)
        yield Note(f"what it holds is an outcome and not its budget: {held:.0f} % of the tokens seen")
        yield from _summary(cell, rows)
        return
    kind, share = kind_of(cell), 100 * (cell.value("realised_budget_fraction") or 0)
    if kind == "none":
        yield _over(cell.setting("budget"), budgeted_curve(cell))
    elif kind == "prompt only":
        yield Note(f"cuts the prompt only and keeps what it generates: {share:.0f} % of the tokens seen are held")
    elif kind == "decode only":
        yield Note(f"cuts nothing of the prompt: {share:.0f} % of the tokens seen are held")
    yield from _summary(cell, rows)


def _over(budget: Mapping[str, Any] | None, rows: _Rows) -> str:
    if not budget:
        seen, _, peak = next(row for row in rows if not row[0] == row[1] == row[2])
        return f"keeps everything, but after {seen:g} tokens it holds {peak:g} entries"
    over = [row for row in rows if row[2] > allowed_entries(budget, row[0])]
    seen, _, peak = over[0]
    return (
        f"after {seen:g} tokens it holds {peak:g} entries, the budget allows {allowed_entries(budget, seen)} "
        f"({len(over)} of {len(rows)} steps are over)"
    )


def _summary(cell: Cell, rows: _Rows) -> Iterator[str]:
    """Compare the numbers told with the steps that they must come from."""
    if any(after[0] <= before[0] for before, after in itertools.pairwise(rows)):
        yield "the logged steps are out of order"
    if any(mean > peak + _ROUNDING for _, mean, peak in rows):
        yield "at a step the mean of the entries is above the largest"
    told, largest = cell.value("entries_peak"), max(row[2] for row in rows)
    if told is not None and told != largest:
        yield f"entries_peak is {told:g}, the largest logged is {largest:g}"
    ranges = {"entries_mean": [row[1] for row in rows], "realised_budget_fraction": [row[1] / row[0] for row in rows]}
    for name, logged in ranges.items():
        value = cell.value(name)
        if value is not None and not min(logged) - _ROUNDING <= value <= max(logged) + _ROUNDING:
            yield f"{name} is {value:.4g}, outside of what was logged ({min(logged):.4g} to {max(logged):.4g})"


@check(
    "A6",
    "bytes of the cache follow from budget and full cache",
    "the memory saved was not saved, or bytes were changed after the run",
    lambda cell, peers: any(cell.value(f"kv_{kind}_bytes") is not None for kind in ("stored", "valid")),
)
def cache_bytes(cell: Cell, peers: Peers) -> Iterator[str]:
    """Compare bytes stored, valid and theoretical with each other, the peaks and the full cache's."""
    stored, valid, theory = (cell.value(f"kv_{kind}_bytes") for kind in ("stored", "valid", "theoretical"))
    if stored is None or valid is None or theory is None:
        yield "kv_stored_bytes, kv_valid_bytes and kv_theoretical_bytes are not all there"
        return
    if not 0 < valid <= stored:
        yield f"{valid:g} bytes are in use, but {stored:g} are stored"
    if valid > theory:
        yield f"{valid:g} bytes are in use, the budget allows {theory:g}"
    yield from _peaks(cell, stored, theory)
    full = full_bytes(cell, peers)
    if full is not None:
        low, high = allowed_share(cell, peers)
        high += (block_tokens(cell) - 1) / (seen_tokens(peers)[0] or 1)
        if not low <= theory / full <= high:
            yield (
                f"its budget is said to be {theory:g} bytes, {100 * theory / full:.1f} % of the full cache's, "
                f"where {100 * low:.1f} to {100 * high:.1f} % are possible"
            )
        if valid / full < low - 1e-9 and kind_of(cell) in ("everything", "both"):
            yield f"{valid:g} bytes in use are {100 * valid / full:.1f} % of the full cache's, too few for its entries"


def _peaks(cell: Cell, stored: float, theory: float) -> Iterator[str]:
    phases = [value for name in _PHASES if (value := cell.value(name)) is not None]
    peak, load, decode = (cell.value(f"peak_{name}_bytes") for name in ("memory", "load", "decode"))
    if peak is not None and phases and peak != max(phases):
        yield f"peak_memory_bytes is {peak:g}, the largest phase has {max(phases):g}"
    if decode is not None and load is not None and decode < load + stored:
        yield f"the peak while decoding is {decode:g} bytes, weights and stored entries alone are {load + stored:g}"
    ratio, activations = cell.value("peak_over_bound_ratio"), cell.value("plain_activation_bytes")
    if peak is None or load is None or ratio is None or activations is None:
        return
    if ratio > peak / (load + activations + theory) * (1 + 1e-9):
        yield f"peak_over_bound_ratio is {ratio:.4g}, more than peak over weights, activations and entries"


def full_bytes(cell: Cell, peers: Peers) -> float | None:
    """Return what the full cache's entries take in the same memory pass, None if it was not measured."""
    full = peers.full
    if full is None or full.task("Memory") != cell.task("Memory"):
        return None
    return full.value("kv_theoretical_bytes")


@lru_cache(maxsize=8)
def seen_tokens(peers: Peers) -> tuple[float | None, float]:
    """Return the fewest and most tokens seen at a logged step of any cell, None and 0 if no step was logged."""
    curves = [rows for cell in peers.usable if (rows := entries_curve(cell))]
    longest = max((row[0] for rows in curves for row in rows), default=0)
    return min((rows[0][0] for rows in curves), default=None), longest


def allowed_share(cell: Cell, peers: Peers) -> tuple[float, float]:
    """Return the least and the largest share of the full cache's bytes that the budget can be."""
    budget, (shortest, longest) = cell.setting("budget"), seen_tokens(peers)
    if not budget:
        return 1.0, 1.0
    if is_outcome(cell):
        return 0.0, 1.0
    steps = (cell.task("Memory") or {}).get("new_tokens", 1)
    if budget.get("tokens") is not None:
        # A budget never reached is the full cache.
        least = min(1.0, budget["tokens"] / (longest + steps)) if shortest else 0.0
        return least, max(1.0, budget["tokens"] / (shortest or 1))
    fraction = float(budget["fraction"])
    if shortest is None:
        return fraction / 2, 1.0  # rounded down from at least one entry, a share is more than half of itself
    of_prompt = 1.0 if budget.get("of") == "seen" else (shortest - 1) / (shortest - 1 + steps)
    most = 1.0 if kind_of(cell) in ("prompt only", "decode only") else fraction + 1 / shortest
    return fraction * of_prompt - 1 / shortest, most


@check(
    "R9",
    "what is evicted is freed; no cost is told of a mask",
    "entries were hidden and not freed, so memory and speed are not those of eviction",
    lambda cell, peers: cell.usable and (_most_bytes(cell, peers) is not None or _simulated(cell)),
)
def freed(cell: Cell, peers: Peers) -> Iterator[str]:
    """Compare the bytes stored with budget and spare slots."""
    if _simulated(cell) and (told := [name for name in _COST if cell.value(name) is not None]):
        yield f"its eviction is simulated, and yet {told[0]} is told"
        return
    stored, most = cell.value("kv_stored_bytes"), _most_bytes(cell, peers)
    if stored is not None and most is not None and stored > most:
        yield f"{stored:g} bytes are stored, where the budget and its spare slots take {most:.6g}: masked, not freed?"


def _most_bytes(cell: Cell, peers: Peers) -> float | None:
    """Return what budget and spare slots take; None where no full cache tells what a slot takes."""
    full, shortest, theory = full_bytes(cell, peers), seen_tokens(peers)[0], cell.value("kv_theoretical_bytes")
    if full is None or theory is None:
        return None
    if shortest is None:  # no step was logged: a slot is small where costs alone are measured
        return theory + _SPARE_SHARE * full if cell.label("evicts_at") == "prompt and decode" else None
    slots = _SPARE_SLOTS if kind_of(cell) in ("everything", "both", "rounds up") else _SPARE_SLOTS_OF_GROWTH
    return theory + slots * full / shortest


def _simulated(cell: Cell) -> bool:
    names = ("simulated", "masked", "mask_only")
    return any(cell.setting("policy", name) is True or cell.label(name) is True for name in names)
