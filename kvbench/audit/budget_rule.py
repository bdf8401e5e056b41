"""What a budget allows at a step, for each kind of policy: those that cut the prompt, the decode, or both.

A record says the kind (labels evicts_at and budget_rounds). Where it does not, the kind is read from the
curve of entries, as far as the policy, if it is one of kvbench's own, can be of that kind; a curve that fits
none from its first to its last step is over budget. No kind that cuts only at decode holds less than a prompt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

from kvbench.audit.bundled import rule_of
from kvbench.audit.evidence import Cell

Kind = Literal["everything", "both", "rounds up", "prompt only", "decode only", "none"]
_DECIMALS = 9  # 0.29 * 100 is 28.999999999999996; the user meant 29
_KINDS: dict[object, Kind] = {"prompt and decode": "both", "prompt": "prompt only", "decode": "decode only"}
_NOT_SHOWN_BY: dict[object, tuple[Kind, ...]] = {
    "prompt and decode": ("prompt only", "decode only"),
    "prompt": ("decode only",),
}
_ROUNDING = 1e-9
_Rows = Sequence[Sequence[float]]


@lru_cache(maxsize=65536)
def entries_curve(cell: Cell) -> list[list[float]]:
    """Return [seen, mean, peak] of every logged step."""
    return cell.curve("entries", 3)


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
    rows, budget = entries_curve(cell), cell.setting("budget")
    if not budget:
        return "everything" if all(mean == peak == seen for seen, mean, peak in rows) else "none"
    said = cell.body["labels"].get("evicts_at")
    if said in _KINDS:
        up = cell.body["labels"].get("budget_rounds") == "up"
        return _if_kept(_said_kind(_KINDS[said], rows, up), budget, rows, up)
    shown = _shown_by(budget, rows)
    return "none" if shown in _NOT_SHOWN_BY.get(rule_of(cell).get("evicts_at"), ()) else shown


def _said_kind(said: Kind, rows: _Rows, up: bool) -> Kind:
    """Return the kind that a label says; what holds less than a prompt cut it, whatever the label says."""
    if said == "decode only" and any(mean < rows[0][0] - 1 - _ROUNDING for _, mean, _ in rows):
        said = "both"
    return "rounds up" if up and said == "both" else said


def _if_kept(kind: Kind, budget: Mapping[str, Any], rows: _Rows, up: bool) -> Kind:
    return kind if all(row[2] <= _most(kind, budget, rows, row[0], up) for row in rows) else "none"


def _most(kind: Kind, budget: Mapping[str, Any], rows: _Rows, seen: float, up: bool) -> float:
    """Return the most entries that a row may hold after `seen` tokens; the shortest prompt bounds the others."""
    allowed = allowed_entries(budget, seen, up=up)
    prompt = rows[0][0] - 1
    if kind == "prompt only":
        return min(prompt, allowed_entries(budget, prompt, up=up, of_prompt=True)) + seen - prompt
    return max(allowed, seen - 1) if kind == "decode only" else allowed


def _shown_by(budget: Mapping[str, Any], rows: _Rows) -> Kind:
    """Return the kind that the curve shows, for records that do not say it."""
    over = [row for row in rows if row[2] > allowed_entries(budget, row[0])]
    if not over:
        return "both"
    if _rounds_up(budget, rows, over):
        return "rounds up"
    if _grows_from_the_prompt(budget, rows, over):
        return "prompt only"
    return "decode only" if _never_above_the_prompt(rows) else "none"


def _rounds_up(budget: Mapping[str, Any], rows: _Rows, over: _Rows) -> bool:
    """Tell whether it is always one more than rounded down, not now and then."""
    differs = [row for row in rows if allowed_entries(budget, row[0]) != allowed_entries(budget, row[0], up=True)]
    within = all(peak <= allowed_entries(budget, seen, up=True) for seen, _, peak in rows)
    return within and 2 * len(over) > len(differs)


def _grows_from_the_prompt(budget: Mapping[str, Any], rows: _Rows, over: _Rows) -> bool:
    """Tell whether it is within the budget after the prompt, and then at most one more per token, at most steps."""
    first_seen, _, first = rows[0]
    within = first <= allowed_entries(budget, first_seen - 1, up=True) + 1
    return within and 2 * len(over) > len(rows) and all(row[2] <= first + row[0] - first_seen for row in rows)


def _never_above_the_prompt(rows: _Rows) -> bool:
    return rows[0][2] == rows[0][0] - 1 and all(peak <= seen - 1 for seen, _, peak in rows)
