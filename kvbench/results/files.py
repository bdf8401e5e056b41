"""Files that are whole and on the disk when a call returns, or not there at all: every file is written here.

A file is written to a temporary name that no other process has, synced, and then given its own name in one
step, so that a name never shows half a file, whatever is killed when, and two writers of one name leave
the whole file of one of them. A record is hard-linked to its name, so that nothing is ever overwritten; what
can be made again at any time is replaced.

    write_new(Path("cells/attempt-1.json"), seal("kvbench_record", 1, body))
    replace_file(Path("report/index.html"), page)

What is sealed is one JSON object in an envelope with its length and checksum, so that damage is noticed and not read;
an array inside JSON is packed: type, shape, and the bytes compressed as text.

    body = unseal(path, "kvbench_record", 1, "Delete it and run the sweep again.")
    array = unpack(pack(np.array([[0, 7], [7, 7]], dtype=np.uint16)))
"""

from __future__ import annotations

import base64
import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import re
import uuid
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvbench.errors import ConfigError, KvbenchError, RecordError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]
else:
    Array = Any  # numpy is imported where an array is unpacked: a command that draws nothing starts without it

_UNUSABLE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
TEMPORARY = ".tmp"
_TYPES = ("u1", "u2")
_MOST_BITS = 1023  # what every reader can make a float of: one record must not end a report of all
_MOST_BYTES = 2**26  # a foreign file must not be able to ask for all memory


def write_new(path: Path, data: bytes) -> None:
    """Write `data` to the new file `path`, whole and durable, or not at all.

    Raises: FileExistsError if `path` exists; RecordError if the disk refuses; ConfigError if the folder
    cannot be written to.
    """
    with _temporary(path) as temporary:
        write_synced(temporary, data)
        link_new(temporary, path)


def replace_file(path: Path, data: bytes) -> None:
    """Write `data` in the place of `path`, whole and durable; for what is not a record and can be made again.

    Raises: RecordError if the disk refuses; ConfigError if the folder cannot be written to.
    """
    with replacing(path) as temporary:
        write_synced(temporary, data)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a new name for a library to write to, which takes the place of `path` when the block ends well.

    Raises: RecordError if the disk refuses; ConfigError if the folder cannot be written to.
    """
    with _temporary(path) as temporary:
        yield temporary
        sync(temporary)
        temporary.replace(path)


def link_over(source: Path, target: Path) -> None:
    """Give `source` the name `target` too, in the place of what has that name.

    Raises: RecordError if the disk refuses; ConfigError if the folder cannot be written to.
    """
    # rename() does nothing when both names are already one file, and leaves the temporary name, which is removed.
    with replacing(target) as temporary:
        os.link(source, temporary)


def write_out(path: Path, data: bytes) -> Path:
    """Write the file that `--out` names on a command line, its folder too; return `path`.

    Raises: ConfigError naming a way out.
    A device or a pipe is written to as it is, and of a link what it leads to is replaced, not the link.
    """
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            path.write_bytes(data)
        else:
            replace_file(path.resolve(), data)
    except (OSError, RuntimeError, KvbenchError) as error:  # a RuntimeError is a circle of links
        cause = (error.__cause__ or error) if isinstance(error, KvbenchError) else error
        why = getattr(cause, "strerror", None) or cause
        raise ConfigError(f"cannot write {path}: {why}; choose another --out") from error
    return path


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, which is made and stays, while the block runs; other processes and threads wait.

    Raises: RecordError if the disk refuses; ConfigError if the folder cannot be written to.
    """
    make_folder(path.parent)
    try:
        # Open for writing: network file systems give an exclusive lock on nothing else.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise storage_error(path, error) from error
    with holding(descriptor):
        yield


@contextlib.contextmanager
def holding(descriptor: int) -> Iterator[None]:
    """Hold the exclusive lock of an open file or folder while the block runs, then close it.

    A file system without locks leaves every file whole, and only their order to chance.
    """
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """Yield a name beside `path` that is gone afterwards; then the folder is synced."""
    make_folder(path.parent)
    # The whole name and the rest together may be longer than a file system allows.
    temporary = path.with_name(f".{path.name[:40]}.{uuid.uuid4().hex}{TEMPORARY}")
    try:
        yield temporary
        sync(path.parent)
    except FileExistsError:
        raise
    except OSError as error:
        raise storage_error(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def link_new(source: Path, target: Path) -> None:
    """Give `source` the name `target` too; of many processes exactly one succeeds.

    Raises: FileExistsError, OSError.
    """
    try:
        os.link(source, target)
    except FileExistsError:
        # A network file system may repeat a request whose answer was lost, and then denies its own success.
        if not target.exists() or not target.samefile(source):
            raise


def make_folder(folder: Path) -> None:
    """Create `folder` and its parents, each durable in its own parent. Raises: ConfigError, RecordError."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    try:
        folder.mkdir(exist_ok=True)
        sync(folder.parent)
    except OSError as error:
        raise storage_error(folder, error) from error


def sync(path: Path) -> None:
    """Make a file, or the names in a folder, durable; raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_synced(path: Path, data: bytes) -> None:
    """Write the new file `path` and sync it; raises OSError, and may then leave a part of it."""
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
    if error.errno in _UNUSABLE:
        return ConfigError(
            f"cannot write {path}: {reason}. The results folder must be a writable folder on a file system "
            "with hard links; choose another one."
        )
    remedy = "Free some space" if error.errno in _FULL else "Check the disk"
    return RecordError(f"cannot write {path}: {reason}. {remedy} and run again; finished cells are kept.")


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
    if isinstance(value, float):
        return None if math.isfinite(value) else f"{path} is {value}; a record holds finite numbers or null."
    if isinstance(value, str):
        surrogate = re.search("[\ud800-\udfff]", value)
        return f"{path} holds half a surrogate pair {surrogate[0]!r}; replace it." if surrogate else None
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        return f"{path} is a whole number of {value.bit_length()} bits; a record holds numbers up to 1e308."
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
    try:
        raw = canonical_json(body).encode()
        if envelope.get("body_bytes") != len(raw):
            raise RecordError(f"its body has {len(raw)} bytes, but {envelope.get('body_bytes')!r:.40} were written.")
        if envelope.get("body_sha256") != hashlib.sha256(raw).hexdigest():
            raise RecordError("its checksum does not match: the body was altered after it was written.")
    except (RecordError, RecursionError) as error:
        raise RecordError(f"{path} is damaged: {error} {remedy}") from error
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


def pack(array: Array) -> dict[str, Any]:
    """Return an array of uint8 or uint16 as a JSON object; rows that resemble each other take little room."""
    name = next(name for name in _TYPES if array.dtype == name)
    raw = array.astype(f"<{name}").tobytes()
    return {"type": name, "shape": list(array.shape), "data": base64.b64encode(zlib.compress(raw)).decode()}


def unpack(value: object) -> Array:
    """Return the array that `pack` was given. Raises: RecordError for anything that `pack` does not return."""
    import numpy as np

    try:
        assert isinstance(value, dict)
        name, shape = value["type"], tuple(value["shape"])
        assert name in _TYPES
        assert all(isinstance(size, int) and size >= 0 for size in shape)
        num_bytes = math.prod(shape) * int(name[1:])
        assert num_bytes <= _MOST_BYTES
        raw = zlib.decompressobj().decompress(base64.b64decode(value["data"], validate=True), num_bytes + 1)
        assert len(raw) == num_bytes
    except (AssertionError, KeyError, TypeError, ValueError, zlib.error) as error:
        raise RecordError(f"a packed array is damaged ({type(error).__name__}).") from error
    return np.frombuffer(raw, dtype=f"<{name}").reshape(shape)
