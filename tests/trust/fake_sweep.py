"""A sweep of 24 cells whose measurement is arithmetic, run by writers that are killed at random instants.

The writers use claims, batches and records as the real sweep does; nothing here imports torch, so that
a new writer is working a few milliseconds after its predecessor was killed.
"""

from __future__ import annotations

import hashlib
import os
import random
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from kvbench.results import claims as claim_file
from kvbench.results.claims import Claims
from kvbench.results.record import BODY_SCHEMA, cell_key
from kvbench.results.store import PartialStore, RecordStore

NUM_CELLS, NUM_BATCHES, NUM_WRITERS = 24, 4, 4
POLICIES = ("full", "h2o", "elastic", "streaming_llm", "random", "snapkv")
Say = Callable[[str, str, object], None]


def cells() -> dict[str, dict[str, Any]]:
    """Return the settings of the sweep's cells by key."""
    settings = [{"policy": policy, "fraction": share / 10} for policy in POLICIES for share in (1, 2, 5, 8)]
    return {cell_key(cell): cell for cell in settings}


def batch(key: str, number: int) -> dict[str, Any]:
    """Measure one batch: a function of cell and number only, and no round decimal."""
    digest = hashlib.sha256(f"{key} {number}".encode()).digest()
    return {"nll": [byte / 7 for byte in digest]}


def body_of(key: str, settings: dict[str, Any], batches: dict[int, dict[str, Any]], sweep: str) -> dict[str, Any]:
    """Return the record; quality from the batches, time from this machine's clock."""
    nll = [value for number in sorted(batches) for value in batches[number]["nll"]]
    empty = {"low": None, "high": None, "n": len(nll), "method": ""}
    return {
        "schema": BODY_SCHEMA,
        "key": key,
        "sweep": sweep,
        "attempt": uuid.uuid4().hex,
        "labels": {
            **{"model": "m", "dataset": "d", "policy": settings["policy"], "budget": f"{settings['fraction']:.0%}"},
            **{"budget_fraction": settings["fraction"], "budget_tokens": None, "positions": "original"},
        },
        "cell": settings,
        "status": "ok",
        "phase": None,
        "error": None,
        "started_utc": datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="milliseconds"),
        "duration_s": random.random(),
        "environment": {"pid": os.getpid()},
        "measurements": {
            "ppl": {"value": sum(nll) / len(nll), "unit": "", **empty},
            "tpot_ms": {"value": random.random(), "unit": "ms", **empty},
        },
        "samples": [{"id": f"{index}", "nll": value} for index, value in enumerate(nll)],
        "curves": {},
    }


def write(
    folder: Path,
    say: Say,
    *,
    sweep: str = "s",
    pause_s: float = 0.0,
    lease_s: float = 60.0,
    num_cells: int = NUM_CELLS,
) -> None:
    """Be one writer: go round the cells until every one has its record."""
    store, claims = RecordStore(folder), Claims(folder, lease_s=lease_s)
    todo = list(cells().items())[:num_cells]
    random.shuffle(todo)
    while todo:
        for key, settings in list(todo):
            if store.accepted(key) is None and not _measure(store, claims, key, settings, say, sweep, pause_s):
                continue
            todo.remove((key, settings))
        if todo:
            time.sleep(0.01)


def _measure(
    store: RecordStore, claims: Claims, key: str, settings: dict[str, Any], say: Say, sweep: str, pause_s: float
) -> bool:
    """Measure one cell unless another writer is at it; return whether it has a record now."""
    claim = claims.take(key)
    if claim is None:
        return False
    try:
        with claim.beating():
            if store.accepted(key) is None:
                parts = PartialStore(store.folder, key)
                done = parts.batches()
                for number in sorted(set(range(NUM_BATCHES)) - done.keys()):
                    time.sleep(pause_s)
                    done[number] = batch(key, number)
                    say("measured", key, number)
                    parts.commit(number, done[number])
                body = body_of(key, settings, done, sweep)
                store.commit(body)
                say("committed", key, body["attempt"])
    finally:
        claim.release()
    return True


def pretend_elsewhere(name: str, wall_offset_s: float, steady_offset_s: float) -> None:
    """Give this process another machine's name and clocks."""
    claim_file.machine.cache_clear()
    claim_file.machine = lambda: f"{name} boot space"  # type: ignore[assignment]
    wall_s, steady_s = time.time, time.monotonic
    time.time = lambda: wall_s() + wall_offset_s
    time.monotonic = lambda: steady_s() + steady_offset_s
    assert abs(datetime.now(UTC) - datetime.fromtimestamp(time.time(), UTC)) < timedelta(seconds=abs(wall_offset_s) + 5)
