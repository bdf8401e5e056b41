"""R11: throughput and share of the roof that the measured times allow.

At least half of the steps of a launch take the median step, so a launch takes at least its prompt and half
of its steps at TPOT; with both ends of a distribution in it a real one takes about all of them.
"""

from __future__ import annotations

from collections.abc import Iterator

from kvbench.audit.check import Check
from kvbench.audit.evidence import Cell, Peers
from kvbench.audit.recomputed import from_launches

_MOST = 1.5


def _problems(cell: Cell, peers: Peers) -> Iterator[str]:
    rate, ttft_ms, tpot_ms = (cell.value(name) for name in ("throughput_tokens_per_s", "ttft_ms", "tpot_ms"))
    speed = cell.task("Speed") or {}
    if rate is not None and ttft_ms is not None and tpot_ms is not None:
        tokens = speed.get("new_tokens", 0) * speed.get("batch_size", 1)
        launch_ms = ttft_ms + (speed.get("new_tokens", 1) - 1) * tpot_ms
        if launch_ms > 0 and rate > _MOST * tokens / launch_ms * 1e3:
            yield f"{rate:.4g} tokens/s, where TTFT and TPOT give {tokens / launch_ms * 1e3:.4g}"
    for prefix in ("", "full_"):
        yield from _roof(cell, prefix)


def _roof(cell: Cell, prefix: str) -> Iterator[str]:
    share = cell.value(f"{prefix}roof_share_fraction")
    if share is None:
        return
    if cell.setting("device") == "cuda" and share > 1:
        yield f"{prefix}roof_share_fraction is {share:.3g}: faster than reading its bytes once"
    again = from_launches(cell, f"{prefix}roof_share_fraction")
    if again is not None and again.value is not None and abs(share - again.value) > 1e-9 * again.value:
        yield f"{prefix}roof_share_fraction is {share:.6g}, roof and launches give {again.value:.6g}"


CHECK = Check(
    id="R11",
    title="throughput and roof share follow from the times",
    meaning="a rate was changed: the times measured beside it do not allow it",
    applies=lambda cell, peers: cell.value("throughput_tokens_per_s") is not None,
    problems=_problems,
)
