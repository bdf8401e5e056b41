"""Files that are whole and on the disk when a call returns, or not there at all.

A file is written to a temporary name, synced, and hard-linked to its own name, so a name never shows
half a file and nothing is ever overwritten, whatever is killed when. What can be made again at any time is
replaced in one step.

    write_new(Path("cells/attempt-1.json"), data)
"""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from pathlib import Path

from kvbench.errors import ConfigError, KvbenchError, RecordError

_UNUSABLE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
TEMPORARY = ".tmp"


def write_new(path: Path, data: bytes) -> None:
    """Write `data` to the new file `path`, whole and durable, or not at all.

    Raises: FileExistsError if `path` exists; RecordError if the disk refuses; ConfigError if the folder
    cannot be written to.
    """
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{TEMPORARY}")
    try:
        write_synced(temporary, data)
        link_new(temporary, path)
        sync_folder(path.parent)
    except FileExistsError:
        raise
    except OSError as error:
        raise storage_error(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def replace_file(path: Path, data: bytes) -> None:
    """Write `data` in the place of `path`, whole and durable; for what is not a record and can be made again.

    Raises: RecordError if the disk refuses; ConfigError if the folder cannot be written to.
    """
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{TEMPORARY}")
    try:
        write_synced(temporary, data)
        temporary.replace(path)
        sync_folder(path.parent)
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
    if error.errno in _FULL:
        return RecordError(f"cannot write {path}: {reason}. Free some space and run again; finished cells are kept.")
    return RecordError(f"cannot write {path}: {reason}. Check the disk and run again; finished cells are kept.")
