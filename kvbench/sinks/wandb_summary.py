"""The W&B run of a whole sweep: its tables, its figures, how cells compare to the full cache, and its records.

>>> write_run(summary_run(summary), place, "offline")
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvbench.results.files import replace_file
from kvbench.results.record import encode_record
from kvbench.results.redaction import hide_known, redacted_body
from kvbench.sinks.wandb_cell import cell_digest, table
from kvbench.sinks.wandb_run import RunSpec

if TYPE_CHECKING:
    import wandb

ARTIFACT_TYPE = "kvbench-records"
_NAMED = {"model": "models", "dataset": "datasets", "policy": "policies"}
_SHOWN = 1  # one more whenever a summary comes to show the same records otherwise


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text, numbers and None."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A picture as the bytes of a PNG file, and how it is read."""

    png: bytes
    caption: str


@dataclass(frozen=True, kw_only=True)
class SweepSummary:
    """A sweep as plain data. `bodies`: its records; `tables`, `figures` and `numbers` by their W&B key.

    folder: the results folder. to: the folder of wandb's files, which is writable.
    A table's key has no slash: W&B would give its artifact a new name, and so a new one, at each upload.
    """

    sweep: str
    bodies: Sequence[Mapping[str, Any]]
    folder: Path
    to: Path
    tables: Mapping[str, Table]
    figures: Mapping[str, Figure]
    numbers: Mapping[str, float | str]


def summary_id(sweep: str, keys: Sequence[str]) -> str:
    """Return the id of the summary run of these cells: the same cells under the same name are the same run."""
    return hashlib.sha256("\n".join([sweep, *sorted(keys)]).encode()).hexdigest()[:16]


def summary_digest(cell_digests: Iterable[str], version: str) -> str:
    """Return what changes when the summary of these cells does; `version` is that of the code which makes it."""
    return hashlib.sha256("\n".join([str(_SHOWN), version, *sorted(cell_digests)]).encode()).hexdigest()


def summary_run(summary: SweepSummary, version: str) -> RunSpec:
    """Return the run of `summary`, without secrets; its config lists what the cells have in common."""
    clean, sweep = [redacted_body(body) for body in summary.bodies], hide_known(summary.sweep)
    names = {many: sorted({str(body["labels"].get(one)) for body in clean}) for one, many in _NAMED.items()}
    return RunSpec(
        id=summary_id(summary.sweep, [body["key"] for body in clean]),
        digest=summary_digest(map(cell_digest, clean), version),
        name=f"summary of {sweep}",
        group=sweep,
        job_type="summary",
        tags=["summary"],
        config={"sweep": sweep, "num_cells": len(clean), **names},
        fill=lambda run: _fill(run, summary, clean),
    )


def _fill(run: wandb.Run, summary: SweepSummary, bodies: Sequence[dict[str, Any]]) -> None:
    import wandb
    from PIL import Image

    shown = redacted_body({name: [list(row) for row in one.rows] for name, one in summary.tables.items()})
    media: dict[str, Any] = {
        name: table(list(one.columns), shown[name]) for name, one in summary.tables.items() if one.rows
    }
    for name, figure in summary.figures.items():
        media[name] = wandb.Image(Image.open(io.BytesIO(figure.png)), caption=figure.caption)
    run.log(media)
    run.log_artifact(_records(summary, bodies))
    statuses = [body["status"] for body in bodies]
    counts = {f"num_cells/{status}": statuses.count(status) for status in sorted(set(statuses))}
    run.summary.update({**counts, **redacted_body(summary.numbers)})


def _records(summary: SweepSummary, bodies: Sequence[dict[str, Any]]) -> wandb.Artifact:
    """Return the records as one artifact: the same records have the same digest, and so make no new version."""
    import wandb

    named = hashlib.sha256(summary.sweep.encode()).hexdigest()[:8]
    artifact = wandb.Artifact(f"records-{_safe(summary.sweep)}-{named}", ARTIFACT_TYPE)
    for original, body in sorted(zip(summary.bodies, bodies, strict=True), key=lambda pair: pair[1]["key"]):
        name = f"cells/{body['key'][:16]}/record.json"
        attempt = summary.folder / f"cells/{body['key'][:16]}/attempt-{body['attempt']}.json"
        kept = attempt if attempt.is_file() else summary.folder / name
        path = kept if body == original else _clean_copy(summary.to, body)
        # Records never change, so they need no second copy in wandb's own folders.
        artifact.add_file(str(path.resolve()), name=name, policy="immutable", skip_cache=True)
    return artifact


def _clean_copy(to: Path, body: dict[str, Any]) -> Path:
    """Write a record in which a secret was found, which became known only later, without it."""
    path = to / "wandb" / "redacted" / f"{body['key'][:16]}.json"
    replace_file(path, encode_record(body))
    return path


def _safe(name: str) -> str:
    return "".join(letter if letter.isalnum() and letter.isascii() else "-" for letter in name)[:64]
