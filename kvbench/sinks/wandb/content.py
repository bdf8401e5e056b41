"""What the W&B run of one cell shows: settings, numbers, curves over the decode, and a row per sample.

>>> write_run(cell_run(body), place, "offline")

What a W&B run shows of a record, and whether a key is there; nothing here imports wandb.

The W&B run of a whole sweep: its tables, its figures, how cells compare to the full cache, and its records.

>>> write_run(summary_run(summary), place, "offline")
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvbench.measures import MEASURES
from kvbench.results.files import canonical_json, replace_file
from kvbench.results.record import MEASURED, encode_record
from kvbench.results.redaction import hide_known, redacted_body
from kvbench.sinks.wandb.run import RunSpec

if TYPE_CHECKING:
    import wandb


_LATENCY_UNITS = ("ms", "tokens/s", "bytes/s", "prompts")
_LATENCY_ENDINGS = ("_ratio_to_full", "roof_share_fraction")
_MEMORY_UNITS = ("bytes", "entries")
_MEMORY_ENDINGS = ("realised_budget_fraction", "peak_over_bound_ratio")
_NAMED = ("model", "dataset", "policy")


def summary_numbers(body: dict[str, Any]) -> dict[str, float]:
    """Return the measurements as flat summary keys: quality/ppl, quality/ppl_low, latency/tpot_ms, ..."""
    return dict(_numbers(body["measurements"]))


def _numbers(measurements: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for name, entry in measurements.items():
        for suffix, part in (("", "value"), ("_low", "low"), ("_high", "high")):
            if entry.get(part) is not None:
                yield f"{measure_group(name)}/{name}{suffix}", entry[part]


def measure_group(name: str) -> str:
    """Return the first part of a measurement's key: quality, latency or memory."""
    unit = MEASURES[name].unit if name in MEASURES else ""
    if unit in _LATENCY_UNITS or name.endswith(_LATENCY_ENDINGS):
        return "latency"
    if name == "num_skipped_items":
        return "quality"
    return "memory" if unit in _MEMORY_UNITS or name.endswith(_MEMORY_ENDINGS) else "quality"


def run_config(body: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a cell as nested groups, each with its name: config.policy.name can be grouped by."""
    cell, labels = body["cell"], body["labels"]
    named = {part: {"name": labels[part], **_settings(cell.get(part))} for part in _NAMED}
    budget = {
        "name": labels["budget"],
        "fraction": labels.get("budget_fraction"),
        "tokens": labels.get("budget_tokens"),
    }
    nested = {**named, "budget": {**_settings(cell.get("budget")), **budget}, "positions": labels.get("positions")}
    return {**cell, **nested, "key": body["key"], "sweep": body["sweep"], "environment": body["environment"]}


def _settings(part: Any) -> dict[str, Any]:
    return part if isinstance(part, dict) else {}


def run_tags(body: dict[str, Any]) -> list[str]:
    """Return model, dataset, policy and status, by which runs are filtered."""
    names = [body["labels"].get(label) for label in _NAMED]
    # wandb refuses empty tags and tags over 64 letters.
    return sorted({str(name)[:64] for name in [*names, body["status"]] if name})


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


ARTIFACT_TYPE = "kvbench-records"
_WANDB_SUMMARY_NAMED = {"model": "models", "dataset": "datasets", "policy": "policies"}
_WANDB_SUMMARY_SHOWN = 1  # one more whenever a summary comes to show the same records otherwise


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
    return hashlib.sha256("\n".join([str(_WANDB_SUMMARY_SHOWN), version, *sorted(cell_digests)]).encode()).hexdigest()


def summary_run(summary: SweepSummary, version: str) -> RunSpec:
    """Return the run of `summary`, without secrets; its config lists what the cells have in common."""
    clean, sweep = [redacted_body(body) for body in summary.bodies], hide_known(summary.sweep)
    names = {
        many: sorted({str(body["labels"].get(one)) for body in clean}) for one, many in _WANDB_SUMMARY_NAMED.items()
    }
    return RunSpec(
        id=summary_id(summary.sweep, [body["key"] for body in clean]),
        digest=summary_digest(map(cell_digest, clean), version),
        name=f"summary of {sweep}",
        group=sweep,
        job_type="summary",
        tags=["summary"],
        config={"sweep": sweep, "num_cells": len(clean), **names},
        fill=lambda run: _wandb_summary_fill(run, summary, clean),
    )


def _wandb_summary_fill(run: wandb.Run, summary: SweepSummary, bodies: Sequence[dict[str, Any]]) -> None:
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
