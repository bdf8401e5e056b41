"""What a cell's cache kept of a few samples: one sealed file beside the record, which it never belongs to.

    cells/<key[:16]>/autopsy.json

It explains numbers and holds none that counts. A missing or damaged one costs its own figures only.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvbench.durable import replace_file
from kvbench.errors import RecordError
from kvbench.sealed import seal, unseal

AUTOPSY_FILE = "autopsy.json"
AUTOPSY_SCHEMA = 1
NEVER = 65_535  # of `freed`: still held at the end; 0: dropped with the prompt. Of `merged`: joined no other entry
GENERATED = 3  # of `kinds`, after those of kvbench.cache.Kind
_KIND, _VERSION = "kvbench_autopsy", 1
_REMEDY = "Nothing but the eviction figures needs it; force=true takes it again."
_FIELDS: dict[str, type] = {"key": str, "num_layers": int, "num_heads": int, "samples": list, "left_out": list}


def autopsy_path(results: Path, key: str) -> Path:
    """Return where the autopsy of the cell `key` lies."""
    return results / "cells" / key[:16] / AUTOPSY_FILE


def write_autopsy(path: Path, body: Mapping[str, Any]) -> None:
    """Write `body` in the place of an older autopsy, whole and durable. Raises: RecordError, ConfigError."""
    replace_file(path, seal(_KIND, _VERSION, body))


def read_autopsy(path: Path, key: str | None = None) -> dict[str, Any]:
    """Return the verified body of the file, of the cell `key` where given. Raises: RecordError naming the path."""
    body = unseal(path, _KIND, _VERSION, _REMEDY)
    schema = body.get("schema")
    if schema != AUTOPSY_SCHEMA:
        raise RecordError(f"{path} has schema {schema!r:.40}; this kvbench reads {AUTOPSY_SCHEMA}. {_REMEDY}")
    for name, kind in _FIELDS.items():
        if not isinstance(body.get(name), kind):
            raise RecordError(f"{path} has no usable {name!r}. {_REMEDY}")
    if key is not None and body["key"] != key:
        raise RecordError(f"{path} belongs to another cell ({body['key'][:16]}). {_REMEDY}")
    return body
