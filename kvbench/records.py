"""One immutable JSON file per cell attempt: how it is keyed, written and read back.

A record is written by `durable` and enveloped by `sealed`: a name never shows half a record, nothing
is ever overwritten, and a reader notices every torn or altered record instead of using its numbers.

    write_record(Path("cells/attempt-1.json"), body)
    body = read_record(Path("cells/attempt-1.json"))
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvbench.durable import write_new
from kvbench.errors import RecordError
from kvbench.sealed import canonical_json, seal, unseal

ENVELOPE_VERSION = 1
_KIND = "kvbench_record"
BODY_SCHEMA = 1
KEY_SCHEMA = 1  # raise it when the meaning of a setting changes, so that old results stop counting
STATUSES = (
    *("ok", "oom", "nonfinite", "timeout", "crash", "killed"),
    *("data_error", "config_error", "incompatible", "preempted", "noisy"),
)
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


def cell_key(settings: Mapping[str, Any]) -> str:
    """Return the 64 hex digits that name a cell: the same settings always give the same key."""
    text = canonical_json({"key_schema": KEY_SCHEMA, "settings": dict(settings)})
    return hashlib.sha256(text.encode()).hexdigest()


def check_body(body: Mapping[str, Any]) -> None:
    """Raise RecordError, saying which field is wrong, unless `body` has the fields of a record."""
    schema = body.get("schema")
    if isinstance(schema, int) and schema > BODY_SCHEMA:
        raise RecordError(
            f"body schema {schema} is from a newer kvbench (this one reads {BODY_SCHEMA}); update kvbench."
        )
    for name, kind in _FIELDS.items():
        if name not in body:
            raise RecordError(f"the body lacks {name!r}; it must have {', '.join(_FIELDS)}.")
        if not isinstance(body[name], kind):
            raise RecordError(f"the body's {name} is {body[name]!r:.60}, which has the wrong type.")
    if schema != BODY_SCHEMA:
        raise RecordError(f"body schema {schema!r} is unknown; this kvbench reads {BODY_SCHEMA}.")
    if body["status"] not in STATUSES:
        raise RecordError(f"status is {body['status']!r:.60}; it must be one of {', '.join(STATUSES)}.")
    if not re.fullmatch("[0-9a-f]{64}", body["key"]):
        raise RecordError(f"key is {body['key']!r:.80}; it must be 64 lower-case hex digits.")
    if not re.fullmatch("[0-9a-f]{32}", body["attempt"]):
        raise RecordError(f"attempt is {body['attempt']!r:.80}; it must be 32 lower-case hex digits.")
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
