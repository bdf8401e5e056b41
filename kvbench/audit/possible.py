"""R14: no number that cannot be: likelihoods above certainty, negative counts and times, shares above one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from kvbench.audit.check import Check
from kvbench.audit.evidence import Cell, Peers
from kvbench.measures import MEASURES, scale_of
from kvbench.stats.paired import POOLED

_SLACK = 1e-9
_NATS_SLACK = 1e-5  # of a token: what is summed over a whole vocabulary in float32 may end below 0
# In nats, and over how many tokens.
_SUMS = {total: count for total, count in POOLED.values() if total.endswith("_sum")}
_COUNTS = (*_SUMS.values(), "num_agreeing_tokens", "num_new_tokens")


def _problems(cell: Cell, peers: Peers) -> Iterator[str]:
    for row in cell.samples:
        if found := next(_of_row(row), None):
            yield f"{row.get('id')}: {found}"
            break
    for name in sorted(cell.body["measurements"]):
        if (value := cell.value(name)) is not None:
            yield from _outside(name, value)


def _of_row(row: Mapping[str, Any]) -> Iterator[str]:
    for name, value in row.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield from _outside(name, value)
            if name in _COUNTS and value != int(value):
                yield f"{name} is {value:g}, and tokens are counted whole"
    compared, agreeing = row.get("num_compared_tokens"), row.get("num_agreeing_tokens")
    if compared is not None and agreeing is not None and agreeing > compared:
        yield f"{agreeing} tokens agree, of {compared} compared"
    for name, count in _SUMS.items():
        if (row.get(name) or 0.0) < -_NATS_SLACK * max(1, row.get(count) or 0):
            yield f"{name} is {row[name]:.4g}, and nothing is likelier than certain, or nearer than equal"


def _outside(name: str, value: float) -> Iterator[str]:
    low, high = _range(name)
    if not low - _SLACK <= value <= high + _SLACK:
        yield f"{name} is {value:.6g}, where {low:g} {'and more' if high == math.inf else f'to {high:g}'} can be"


@cache
def _range(name: str) -> tuple[float, float]:
    """Return what a field of a sample or a measurement may be; anything for names that are not known."""
    if name in _COUNTS:
        return 0.0, math.inf
    low, high = scale_of(name)
    in_nats = name in MEASURES and MEASURES[name].unit in ("nats/token", "ppl")
    return low - (_NATS_SLACK if in_nats else 0.0), high


POSSIBLE_CHECK = Check(
    id="R14",
    title="no number that cannot be",
    meaning="samples or results were made up: no run gives such a number",
    applies=lambda cell, peers: cell.usable and bool(cell.body["measurements"] or cell.samples),
    problems=_problems,
)
