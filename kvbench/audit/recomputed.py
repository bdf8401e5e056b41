"""Numbers of a cell computed again from its samples and launches, as the run computed them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

from kvbench.audit.evidence import Cell
from kvbench.measures import measure
from kvbench.stats.intervals import Interval, launch_interval, mean_interval, pooled_ratio_interval, ratio_interval
from kvbench.stats.paired import POOLED

_NUM_RESAMPLES = 2000


@lru_cache(maxsize=65536)
def from_samples(cell: Cell, name: str) -> Interval | None:
    """Return measurement `name` from the rows, None if it does not come from them.

    Raises: MeasureError if the rows cannot give it.
    """
    if name in POOLED:
        top, bottom = POOLED[name]
        transform = math.exp if measure(name).unit == "ppl" else None
        rows = [r for r in cell.samples if _number(r.get(top)) is not None and (_number(r.get(bottom)) or 0) > 0]
        clusters = [str(row.get("cluster")) for row in rows]
        if not rows:
            return None
        sums = [[float(row[field]) for row in rows] for field in (top, bottom)]
        return pooled_ratio_interval(sums[0], sums[1], clusters, transform, num_resamples=_NUM_RESAMPLES)
    rows = [row for row in cell.samples if _number(row.get(name)) is not None]
    if not any(name in row for row in cell.samples):
        return None
    return mean_interval(
        [float(row[name]) for row in rows], [str(row.get("cluster")) for row in rows], num_resamples=_NUM_RESAMPLES
    )


def from_launches(cell: Cell, name: str) -> Interval | None:
    """Return measurement `name` from the curve of launches, None if it does not come from it.

    Raises: MeasureError if a launch took no time.
    """
    rows = cell.curve("launches_ms", 4)
    if not rows:
        return None
    ttft, tpot, full_ttft, full_tpot = (list(column) for column in zip(*rows, strict=True))
    roofs = {f"{prefix}roof_share_fraction": (cell.value(f"{prefix}roof_ms"), times) for prefix, times in _arms(rows)}
    if name in roofs:
        roof_ms, times = roofs[name]
        return None if roof_ms is None or min(times) <= 0 else launch_interval([roof_ms / one for one in times])
    medians = {"ttft_ms": ttft, "tpot_ms": tpot, "full_ttft_ms": full_ttft, "full_tpot_ms": full_tpot}
    if name in medians:
        return launch_interval(medians[name])
    pairs = {"ttft_ratio_to_full": (ttft, full_ttft), "tpot_ratio_to_full": (tpot, full_tpot)}
    return ratio_interval(*pairs[name]) if name in pairs else None


def _arms(rows: Sequence[Sequence[float]]) -> list[tuple[str, list[float]]]:
    return [("", [row[1] for row in rows]), ("full_", [row[3] for row in rows])]


def tolerance(cell: Cell, name: str) -> float:
    """Return the relative difference that is rounding: the released loop rounds to the model's precision."""
    released = cell.task("PerplexityReleased") or {}
    if name != "ppl_released" or not released.get("model_precision"):
        return 1e-9
    return 0.02 if cell.setting("model", "dtype") in ("bfloat16", "float16") else 1e-5


def _number(value: object) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
