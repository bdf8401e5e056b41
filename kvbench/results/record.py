"""What a record is, one immutable JSON file per cell attempt: how it is keyed, checked, written and read back.

    write_record(Path("cells/attempt-1.json"), body)
    body = read_record(Path("cells/attempt-1.json"))
    kept = read_cell(Path("results/cells/0123456789abcdef"))  # the attempt that counts

Beside it may lie `autopsy.json`, what the cell's cache kept of a few samples: it explains numbers and holds none that
counts. A missing or damaged one costs its own figures only.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvbench.errors import ConfigError, RecordError
from kvbench.results.files import canonical_json, replace_file, seal, unseal, write_new

ENVELOPE_VERSION = 1
_KIND = "kvbench_record"
RECORD_FILE = "record.json"
# What a body holds and how its key is made; each record states its own, and its key is recomputed by that one.
# Raise it when the meaning of a setting changes: old records stay valid, and no longer count for new cells.
# 1: plug-ins by the path of their class, settings as they were spelled. 2: by class and source, settings by value.
BODY_SCHEMA = 2
STATUSES = (
    *("ok", "oom", "nonfinite", "timeout", "crash", "killed"),
    *("data_error", "config_error", "incompatible", "preempted", "noisy"),
)
MACHINE = ("system", "machine", "cpu_model", "gpu", "num_threads")  # times are compared only where these are the same
MEASURED = ("ok", "noisy")  # the cell was measured to its end; of a noisy one the times are in no ranking
_FIELDS: dict[str, tuple[type, ...]] = {
    "schema": (int,),
    **dict.fromkeys(("key", "sweep", "attempt", "status", "started_utc"), (str,)),
    **dict.fromkeys(("labels", "cell", "environment", "measurements", "curves"), (dict,)),
    "samples": (list,),
    "phase": (str, type(None)),
    "error": (dict, type(None)),
    "duration_s": (int, float),
}


def check_results_folder(folder: Path) -> None:
    """Raise ConfigError unless there is such a folder."""
    if not folder.is_dir():
        raise ConfigError(f"the results folder {folder} does not exist; run a sweep first or give the right folder.")


def cell_key(settings: Mapping[str, Any], schema: int = BODY_SCHEMA) -> str:
    """Return the 64 hex digits that name a cell: the same settings always give the same key.

    schema: that of the record which holds the settings; nothing that they name is imported.
    """
    text = canonical_json({"key_schema": schema, "settings": dict(settings)})
    return hashlib.sha256(text.encode()).hexdigest()


def cell_folder(results: Path, key: str) -> Path:
    """Return the folder that holds what is kept of the cell `key`."""
    return results / "cells" / key[:16]


def check_body(body: Mapping[str, Any]) -> None:
    """Raise RecordError, saying which field is wrong, unless `body` has the fields of a record."""
    schema = body.get("schema")
    if isinstance(schema, int) and schema > BODY_SCHEMA:
        raise RecordError(
            f"body schema {schema} is from a newer kvbench (this one reads up to {BODY_SCHEMA}); update kvbench."
        )
    for name, kind in _FIELDS.items():
        if name not in body:
            raise RecordError(f"the body lacks {name!r}; it must have {', '.join(_FIELDS)}.")
        if not isinstance(body[name], kind):
            raise RecordError(f"the body's {name} is {body[name]!r:.60}, which has the wrong type.")
    if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
        raise RecordError(f"body schema {schema!r} is unknown; this kvbench reads 1 to {BODY_SCHEMA}.")
    if body["status"] not in STATUSES:
        raise RecordError(f"status is {body['status']!r:.60}; it must be one of {', '.join(STATUSES)}.")
    for name, length in (("key", 64), ("attempt", 32)):
        if not re.fullmatch(f"[0-9a-f]{{{length}}}", body[name]):
            raise RecordError(f"{name} is {body[name]!r:.80}; it must be {length} lower-case hex digits.")
    for name, entry in body["measurements"].items():
        if not isinstance(entry, dict) or not isinstance(entry.get("value", ""), int | float | None):
            raise RecordError(f"measurement {name} is {entry!r:.60}; it needs a value that is a number or null.")


def encode_record(body: Mapping[str, Any]) -> bytes:
    """Return the file content for `body`: envelope, length and SHA-256 of its canonical JSON, body."""
    check_body(body)
    return seal(_KIND, ENVELOPE_VERSION, body)


def write_record(path: Path, body: Mapping[str, Any]) -> None:
    """Write `body` to the new file `path`, whole and durable, or not at all.

    Raises: FileExistsError if `path` exists; RecordError if the body is wrong or the disk refuses;
    ConfigError if the folder cannot be written to.
    """
    write_new(path, encode_record(body))


def read_record(path: Path) -> dict[str, Any]:
    """Return the verified body of the record at `path`.

    Raises: RecordError naming the path and what to do, if it is torn, altered, foreign or too new.
    """
    body = unseal(path, _KIND, ENVELOPE_VERSION, "Delete it and run the sweep again; only this cell is measured again.")
    try:
        check_body(body)
    except RecordError as error:
        raise RecordError(f"{path} cannot be used: {error}") from error
    return body


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """A file (path relative to the results folder) that was not used, or not wholly, and why."""

    path: str
    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class CellRecord:
    """The attempt of a cell that counts, of how many that were measured, and those that failed after it.

    A failure never replaces a measurement.
    """

    body: dict[str, Any]
    later_failures: tuple[dict[str, Any], ...] = ()
    num_measured: int = 1


def read_cell(folder: Path) -> CellRecord:
    """Return what counts of the cell in `folder` (results/cells/<key[:16]>); every reader of records asks here.

    An attempt that cannot be read is left out. Raises: RecordError if record.json cannot be used.
    """
    accepted = read_record(folder / RECORD_FILE)
    others = []
    for path in sorted(folder.glob("attempt-*.json")):
        if path.name != f"attempt-{accepted['attempt']}.json":
            with contextlib.suppress(RecordError):
                others.append(read_record(path))
    return counting(accepted, others)


def counting(accepted: dict[str, Any], others: Iterable[dict[str, Any]]) -> CellRecord:
    """Return `accepted` (record.json), or if that failed the newest of the `others` that was measured."""
    own = [body for body in others if body["key"] == accepted["key"]]
    measured = [body for body in own if body["status"] in MEASURED]
    body = accepted if accepted["status"] in MEASURED or not measured else max(measured, key=_started)
    if body["status"] not in MEASURED:
        return CellRecord(body=body)
    failures = [one for one in (accepted, *own) if one["status"] not in MEASURED and _started(one) > _started(body)]
    num_measured = len(measured) + (accepted["status"] in MEASURED)
    return CellRecord(body=body, later_failures=tuple(sorted(failures, key=_started)), num_measured=num_measured)


def is_uncommitted(environment: Mapping[str, Any]) -> bool:
    """Tell whether the code that measured had changes that no commit holds."""
    return str(environment.get("git_commit")).endswith("-dirty")


def _started(body: Mapping[str, Any]) -> str:
    return str(body["started_utc"])


AUTOPSY_FILE = "autopsy.json"
AUTOPSY_SCHEMA = 1
NEVER = 65_535  # of `freed`: still held at the end; 0: dropped with the prompt. Of `merged`: joined no other entry
GENERATED = 3  # of `kinds`, after those of kvbench.cache.Kind
_AUTOPSY_KIND, _AUTOPSY_VERSION = "kvbench_autopsy", 1
_AUTOPSY_REMEDY = "Nothing but the eviction figures needs it; force=true takes it again."
_AUTOPSY_FIELDS = {"key": str, "num_layers": int, "num_heads": int, "samples": list, "left_out": list}


def autopsy_path(results: Path, key: str) -> Path:
    """Return where the autopsy of the cell `key` lies."""
    return cell_folder(results, key) / AUTOPSY_FILE


def write_autopsy(path: Path, body: Mapping[str, Any]) -> None:
    """Write `body` in the place of an older autopsy, whole and durable. Raises: RecordError, ConfigError."""
    replace_file(path, seal(_AUTOPSY_KIND, _AUTOPSY_VERSION, body))


def read_autopsy(path: Path, key: str | None = None) -> dict[str, Any]:
    """Return the verified body of the file, of the cell `key` where given. Raises: RecordError naming the path."""
    body = unseal(path, _AUTOPSY_KIND, _AUTOPSY_VERSION, _AUTOPSY_REMEDY)
    schema = body.get("schema")
    if schema != AUTOPSY_SCHEMA:
        raise RecordError(f"{path} has schema {schema!r:.40}; this kvbench reads {AUTOPSY_SCHEMA}. {_AUTOPSY_REMEDY}")
    for name, kind in _AUTOPSY_FIELDS.items():
        if not isinstance(body.get(name), kind):
            raise RecordError(f"{path} has no usable {name!r}. {_AUTOPSY_REMEDY}")
    if key is not None and body["key"] != key:
        raise RecordError(f"{path} belongs to another cell ({body['key'][:16]}). {_AUTOPSY_REMEDY}")
    return body
