"""Record bodies for the tests of records and sinks."""

from __future__ import annotations

import uuid
from typing import Any

from kvbench.results.record import BODY_SCHEMA, cell_key


def make_body(seed: int = 0, **changes: Any) -> dict[str, Any]:
    """Return a valid body; `seed` decides the cell and thus the key, `changes` replaces fields."""
    cell = {"policy": {"name": "h2o", "recent_tokens": 4}, "seed": seed}
    body: dict[str, Any] = {
        "schema": BODY_SCHEMA,
        "key": cell_key(cell),
        "sweep": "demo",
        "attempt": uuid.uuid4().hex,
        "labels": {
            **{"model": "tiny-llava", "dataset": "scenes", "policy": "h2o", "budget": "20 % of seen"},
            "positions": "original",
        },
        "cell": cell,
        "status": "ok",
        "phase": None,
        "error": None,
        "started_utc": "2026-11-23T13:00:00+00:00",
        "duration_s": 1.5,
        "environment": {"torch": "2.13.0"},
        "measurements": {
            "ppl": {"value": 1.25, "low": 1.125, "high": None, "n": 2, "unit": "", "method": ""},
            "tpot_ms": {"value": 3.5, "low": None, "high": None, "n": 5, "unit": "ms", "method": ""},
            "kv_stored_bytes": {"value": 2**20, "low": None, "high": None, "n": 1, "unit": "B", "method": ""},
            "kl_to_full": {"value": None, "low": None, "high": None, "n": 0, "unit": "", "method": ""},
        },
        "samples": [
            {"id": "scenes/test/0", "text": "a caf\u00e9", "first_divergence_tokens": None},
            {"id": "scenes/test/1", "text": "two", "first_divergence_tokens": 3},
        ],
        "curves": {"entries": [[10, 4.0, 5], [20, 4.5, 5]]},
    }
    return {**body, **changes}
