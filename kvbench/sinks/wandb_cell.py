"""What the W&B run of one cell shows: settings, numbers, curves over the decode, and a row per sample.

>>> write_run(cell_run(body), place, "offline")
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from kvbench.results.files import canonical_json
from kvbench.results.record import MEASURED
from kvbench.sinks.wandb_fields import run_config, run_tags, summary_numbers
from kvbench.sinks.wandb_run import RunSpec

if TYPE_CHECKING:
    import wandb

_SHOWN = 2  # one more whenever a run comes to show its record otherwise, so that it is sent again
# Curve of a record: its prefix here, and its columns, of which the first is the horizontal axis.
_CURVES = {
    "entries": ("entries", ("seen_tokens", "mean", "max")),
    "launches_ms": ("launches", ("launch", "ttft_ms", "tpot_ms", "full_ttft_ms", "full_tpot_ms")),
    "capacity_tries": ("capacity", ("try", "of_full_cache", "num_prompts", "fits")),
}
_COUNTED = ("launches_ms", "capacity_tries")  # their axis is their order


def cell_run(body: dict[str, Any], *, group: str = "") -> RunSpec:
    """Return the run of a record's body, in `group` (by default the sweep of the record)."""
    labels = body["labels"]
    return RunSpec(
        id=body["key"][:16],
        digest=cell_digest(body),
        name=f"{labels['policy']}@{labels['budget']}",
        group=group or body["sweep"],
        job_type="cell",
        tags=run_tags(body),
        config=run_config(body),
        fill=lambda run: _fill(run, body),
        exit_code=0 if body["status"] in MEASURED else 1,
    )


def cell_digest(body: dict[str, Any]) -> str:
    """Return the SHA-256 of what the run of `body` is made from."""
    return hashlib.sha256(f"{_SHOWN}\n{canonical_json(body)}".encode()).hexdigest()


def _fill(run: wandb.Run, body: dict[str, Any]) -> None:
    for name, (prefix, columns) in _CURVES.items():
        _log_curve(run, prefix, columns, _rows(name, body["curves"].get(name, [])))
    _log_samples(run, body["samples"])
    run.summary.update({"status": body["status"], "duration_s": body["duration_s"], **summary_numbers(body)})


def _rows(name: str, curve: list[list[float]]) -> Iterable[list[float]]:
    return ([number, *row] for number, row in enumerate(curve, 1)) if name in _COUNTED else curve


def _log_curve(run: wandb.Run, prefix: str, columns: tuple[str, ...], rows: Iterable[list[float]]) -> None:
    axis, *lines = columns
    # Their last values would stand among the measurements.
    run.define_metric(axis, hidden=True, summary="none")
    run.define_metric(f"{prefix}/*", step_metric=axis, summary="none")
    for at, *values in rows:
        run.log({axis: at, **{f"{prefix}/{line}": value for line, value in zip(lines, values, strict=False)}})


def _log_samples(run: wandb.Run, samples: list[dict[str, Any]]) -> None:
    if samples:
        columns = list(dict.fromkeys(name for sample in samples for name in sample))
        run.log({"samples": table(columns, [[sample.get(name) for name in columns] for sample in samples])})


def table(columns: list[str], rows: list[list[Any]]) -> wandb.Table:
    """Return a W&B table; a column may hold text, numbers and nothing side by side."""
    import wandb

    return wandb.Table(columns=[*columns], data=[*rows], allow_mixed_types=True)
