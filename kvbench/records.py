"""One immutable JSON file per cell attempt: how it is keyed, written and read back.

A record is written to a temporary file, synced, and then hard-linked to its name, so a name never
shows half a record and nothing is ever overwritten. Length and checksum are inside the file, so a
reader notices every torn or altered record instead of using its numbers. (Writer and reader of the
one format share this file, which makes it longer than most.)

    write_record(Path("cells/attempt-1.json"), body)
    body = read_record(Path("cells/attempt-1.json"))
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvbench.errors import ConfigError, KvbenchError, RecordError

ENVELOPE_VERSION = 1
BODY_SCHEMA = 1
KEY_SCHEMA = 1  # raise it when the meaning of a setting changes, so that old results stop counting
STATUSES = (
    *("ok", "oom", "nonfinite", "timeout", "crash", "killed"),
    *("data_error", "config_error", "incompatible", "preempted", "noisy"),
)
_FIELDS: dict[str, tuple[type, ...]] = {
    "schema": (int,),
    **dict.fromkeys(("key", "sweep", "attempt", "status", "started_utc"), (str,)),
    **dict.fromkeys(("labels", "cell", "environment", "measurements", "curves"), (dict,)),
    "samples": (list,),
    "phase": (str, type(None)),
    "error": (dict, type(None)),
    "duration_s": (int, float),
}
_RERUN = "Delete it and run the sweep again; only this cell is measured again."


def canonical_json(value: object) -> str:
    """Return the one JSON text of `value`: sorted keys, no spaces, no NaN; tuples become lists.

    Raises: RecordError naming the path of a value that JSON cannot hold or that is not finite.
    """
    problem = _json_problem(value, "value")
    if problem is not None:
        raise RecordError(problem)
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)


def _json_problem(value: object, path: str) -> str | None:
    if isinstance(value, Mapping):
        for name, item in value.items():
            if not isinstance(name, str):
                return f"{path} has the key {name!r}; keys must be text, because JSON would turn it into text."
            if problem := _json_problem(name, f"{path}, key") or _json_problem(item, f"{path}.{name}"):
                return problem
        return None if isinstance(value, dict) else f"{path} is a {type(value).__name__}; make it a dict."
    if isinstance(value, list | tuple):
        problems = (_json_problem(item, f"{path}[{index}]") for index, item in enumerate(value))
        return next((problem for problem in problems if problem is not None), None)
    return _scalar_problem(value, path)


def _scalar_problem(value: object, path: str) -> str | None:
    if isinstance(value, float):
        return None if math.isfinite(value) else f"{path} is {value}; a record holds finite numbers or null."
    if isinstance(value, str):
        surrogate = re.search("[\ud800-\udfff]", value)
        return f"{path} holds half a surrogate pair {surrogate[0]!r}; replace it." if surrogate else None
    if value is None or isinstance(value, int):
        return None
    return f"{path} is a {type(value).__name__}; a record holds dict, list, text, int, float, bool and null."


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
    text = canonical_json(dict(body))
    raw = text.encode()
    head = f'{{"kvbench_record":{ENVELOPE_VERSION},"body_bytes":{len(raw)}'
    return f'{head},"body_sha256":"{hashlib.sha256(raw).hexdigest()}","body":{text}}}\n'.encode()


def write_record(path: Path, body: Mapping[str, Any]) -> None:
    """Write `body` to the new file `path`, whole and durable, or not at all.

    Raises: FileExistsError if `path` exists; RecordError if the body is wrong or the disk refuses;
    ConfigError if the folder cannot be written to.
    """
    data = encode_record(body)
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        _write_synced(temporary, data)
        os.link(temporary, path)
        sync_folder(path.parent)
    except FileExistsError:
        raise
    except OSError as error:
        raise storage_error(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def make_folder(folder: Path) -> None:
    """Create `folder` and its parents, each durable in its own parent."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    try:
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)
    except OSError as error:
        raise storage_error(folder, error) from error


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable; raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_synced(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        rest = memoryview(data)
        while rest:
            # A nearly full disk takes a part and raises nothing, so the count decides, not the call.
            written = os.write(descriptor, rest)
            if written <= 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            rest = rest[written:]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def storage_error(path: Path, error: OSError) -> KvbenchError:
    """Return the one-line error for a failed write at `path`: ConfigError if the folder is unusable."""
    reason = error.strerror or str(error)
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST):
        return ConfigError(
            f"cannot write {path}: {reason}. The results folder must be a writable folder on a file system "
            "with hard links; choose another one."
        )
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RecordError(f"cannot write {path}: {reason}. Free some space and run again; finished cells are kept.")
    return RecordError(f"cannot write {path}: {reason}. Check the disk and run again; finished cells are kept.")


def read_record(path: Path) -> dict[str, Any]:
    """Return the verified body of the record at `path`.

    Raises: RecordError naming the path and what to do, if it is torn, altered, foreign or too new.
    """
    envelope = _parse(path)
    if not isinstance(envelope, dict) or "kvbench_record" not in envelope:
        raise RecordError(f"{path} is not a kvbench record. Move it out of the results folder.")
    version = envelope["kvbench_record"]
    if isinstance(version, int) and version > ENVELOPE_VERSION:
        raise RecordError(f"{path} is a record of version {version}; this kvbench reads {ENVELOPE_VERSION}. Update it.")
    body = envelope.get("body")
    if version != ENVELOPE_VERSION or not isinstance(body, dict):
        raise RecordError(f"{path} has a damaged envelope. {_RERUN}")
    _verify(path, envelope, body)
    return body


def _parse(path: Path) -> object:
    try:
        # A pipe or a device in the place of a record would block the read for ever.
        if path.exists() and not path.is_file():
            raise RecordError(f"{path} is not a file. Move it out of the way; a record belongs there.")
        return json.loads(path.read_bytes().decode())
    except FileNotFoundError as error:
        raise RecordError(f"{path} does not exist. Run its cell first.") from error
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error.strerror}. Check its permissions and the disk.") from error
    except UnicodeDecodeError as error:
        raise RecordError(f"{path} is not UTF-8 text, so it is torn or foreign. {_RERUN}") from error
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{path} is torn or is not JSON ({error!s:.80}). {_RERUN}") from error


def _verify(path: Path, envelope: dict[str, Any], body: dict[str, Any]) -> None:
    try:
        raw = canonical_json(body).encode()
        if envelope.get("body_bytes") != len(raw):
            raise RecordError(f"its body has {len(raw)} bytes, but {envelope.get('body_bytes')!r:.40} were written.")
        if envelope.get("body_sha256") != hashlib.sha256(raw).hexdigest():
            raise RecordError("its checksum does not match: the body was altered after it was written.")
    except (RecordError, RecursionError) as error:
        raise RecordError(f"{path} is damaged: {error} {_RERUN}") from error
    try:
        check_body(body)
    except RecordError as error:
        raise RecordError(f"{path} cannot be used: {error}") from error
