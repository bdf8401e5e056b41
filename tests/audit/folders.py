"""Real records of a small sweep, and how a forger puts changed ones into a folder: sealed, in the right place.

honest.json: kvbench -m policy=full,h2o,random budget.fraction=0.2,0.5 dataset.num_samples=4 batch_size=4
task.speed.num_blocks=2 task.speed.new_tokens=12 task.memory.new_tokens=12 sweep=small
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvbench.results.record import cell_key, write_record
from kvbench.stats.intervals import launch_interval, mean_interval, pooled_ratio_interval

Body = dict[str, Any]
Bodies = dict[str, Body]
Change = Callable[[Bodies], None]
Doctored = tuple[Change, str, set[str]]
_POOLED = {
    "ppl": ("nll_sum", "num_scored_tokens", math.exp),
    "kl_to_full": ("kl_sum", "num_compared_tokens", None),
    "top1_agreement_fraction": ("num_agreeing_tokens", "num_compared_tokens", None),
}
LAUNCH_COLUMNS = {"ttft_ms": 0, "tpot_ms": 1, "full_ttft_ms": 2, "full_tpot_ms": 3}


def honest() -> dict[str, Body]:
    """Return the bodies by policy and budget: full, h2o 0.2, h2o 0.5, random 0.2, random 0.5."""
    bodies = json.loads((Path(__file__).parent / "honest.json").read_text(encoding="utf-8"))
    return {_name(body): body for body in bodies}


def _name(body: Body) -> str:
    fraction = body["labels"]["budget_fraction"]
    return body["labels"]["policy"] + ("" if fraction is None else f" {fraction}")


def write_folder(folder: Path, bodies: list[Body]) -> Path:
    """Write each body as an attempt and as the record that counts."""
    for body in bodies:
        place = folder / "cells" / body["key"][:16]
        write_record(place / f"attempt-{body['attempt']}.json", body)
        os.link(place / f"attempt-{body['attempt']}.json", place / "record.json")
    return folder


def rekey(body: Body) -> None:
    """Give the body the key of its settings."""
    body["key"] = cell_key(body["cell"], body["schema"])


def summarise(body: Body) -> None:
    """Compute every number again that comes from the samples, as a careful forger would."""
    rows = body["samples"]
    clusters = [row["cluster"] for row in rows]
    for name, entry in body["measurements"].items():
        if name in _POOLED:
            top, bottom, transform = _POOLED[name]
            interval = pooled_ratio_interval([r[top] for r in rows], [r[bottom] for r in rows], clusters, transform)
        elif any(name in row for row in rows):
            scored = [row for row in rows if row.get(name) is not None]
            interval = mean_interval([row[name] for row in scored], [row["cluster"] for row in scored])
        else:
            continue
        entry |= interval.as_measurement(entry["unit"])


def summarise_launches(body: Body) -> None:
    """Compute the latencies again."""
    for name, column in LAUNCH_COLUMNS.items():
        times = [row[column] for row in body["curves"]["launches_ms"]]
        body["measurements"][name] |= launch_interval(times).as_measurement("ms")


def scale(body: Body, name: str, factor: float) -> None:
    """Multiply a measurement and its bounds."""
    entry = body["measurements"][name]
    entry |= {part: entry[part] * factor for part in ("value", "low", "high") if entry[part] is not None}
