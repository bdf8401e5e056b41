"""One JSON object in an envelope with its length and checksum, so that damage is noticed and not read.

data = seal("kvbench_record", 1, body)
body = unseal(path, "kvbench_record", 1, "Delete it and run the sweep again.")
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvbench.errors import RecordError


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


def seal(kind: str, version: int, body: Mapping[str, Any]) -> bytes:
    """Return the file content for `body`: kind and version, length and SHA-256 of its canonical JSON, body."""
    text = canonical_json(dict(body))
    raw = text.encode()
    head = f'{{"{kind}":{version},"body_bytes":{len(raw)}'
    return f'{head},"body_sha256":"{hashlib.sha256(raw).hexdigest()}","body":{text}}}\n'.encode()


def unseal(path: Path, kind: str, version: int, remedy: str) -> dict[str, Any]:
    """Return the body of the file `path`; `remedy` ends the message about a damaged one.

    Raises: RecordError naming the path, if it is missing, torn, altered, of another kind or too new.
    """
    envelope = _parse(path, remedy)
    name = kind.replace("_", " ")
    if not isinstance(envelope, dict) or kind not in envelope:
        raise RecordError(f"{path} is not a {name}. Move it out of the results folder.")
    found, body = envelope[kind], envelope.get("body")
    if isinstance(found, int) and found > version:
        raise RecordError(f"{path} is a {name} of version {found}; this kvbench reads {version}. Update it.")
    if found != version or isinstance(found, bool) or not isinstance(body, dict):
        raise RecordError(f"{path} has a damaged envelope. {remedy}")
    _verify(path, envelope, body, remedy)
    return body


def _parse(path: Path, remedy: str) -> object:
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
        raise RecordError(f"{path} is not UTF-8 text, so it is torn or foreign. {remedy}") from error
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{path} is torn or is not JSON ({error!s:.80}). {remedy}") from error


def _verify(path: Path, envelope: dict[str, Any], body: dict[str, Any], remedy: str) -> None:
    try:
        raw = canonical_json(body).encode()
        if envelope.get("body_bytes") != len(raw):
            raise RecordError(f"its body has {len(raw)} bytes, but {envelope.get('body_bytes')!r:.40} were written.")
        if envelope.get("body_sha256") != hashlib.sha256(raw).hexdigest():
            raise RecordError("its checksum does not match: the body was altered after it was written.")
    except (RecordError, RecursionError) as error:
        raise RecordError(f"{path} is damaged: {error} {remedy}") from error
