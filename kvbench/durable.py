"""Files that are whole and on the disk when a call returns, or not there at all: every file is written here.

A file is written to a temporary name that no other process has, synced, and then given its own name in one
step, so that a name never shows half a file, whatever is killed when, and two writers of one name leave
the whole file of one of them. A record is hard-linked to its name, so that nothing is ever overwritten; what
can be made again at any time is replaced.

    write_new(Path("cells/attempt-1.json"), data)
    replace_file(Path("report/index.html"), page)
    with locked(Path("report/.lock")):
        ...
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import uuid
from collections.abc import Iterator
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
        _sync(temporary)
        temporary.replace(path)


def link_over(source: Path, target: Path) -> None:
    """Give `source` the name `target` too, in the place of what has that name. Raises: OSError."""
    temporary = _new_name(target)
    try:
        os.link(source, temporary)
        temporary.replace(target)
    finally:
        # rename() does nothing when both names are already one file, and leaves the temporary name.
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_out(path: Path, data: bytes) -> None:
    """Write the file that `--out` names on a command line, its folder too. Raises: ConfigError naming a way out.

    A device or a pipe is written to as it is, and of a link what it leads to is replaced, not the link.
    """
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            path.write_bytes(data)
            return
        replace_file(path.resolve(), data)
    except (OSError, RuntimeError) as error:  # a RuntimeError is a circle of links
        raise _refused_out(path, error) from error
    except KvbenchError as error:
        raise _refused_out(path, error.__cause__ or error) from error


def _refused_out(path: Path, error: BaseException) -> ConfigError:
    return ConfigError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}; choose another --out")


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
    temporary = _new_name(path)
    try:
        yield temporary
        sync_folder(path.parent)
    except FileExistsError:
        raise
    except OSError as error:
        raise storage_error(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _new_name(path: Path) -> Path:
    # The whole name and the rest together may be longer than a file system allows.
    return path.with_name(f".{path.name[:40]}.{uuid.uuid4().hex}{TEMPORARY}")


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
    _sync(folder)


def _sync(path: Path) -> None:
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
    if error.errno in _FULL:
        return RecordError(f"cannot write {path}: {reason}. Free some space and run again; finished cells are kept.")
    return RecordError(f"cannot write {path}: {reason}. Check the disk and run again; finished cells are kept.")
