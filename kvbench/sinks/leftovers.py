"""What killed processes leave behind and nobody needs: found first, removed only on request.

Half-written temporary files, leases of owners that are gone, batches of cells that have their record, autopsies
of cells that have none.
Attempts are never leftovers: they are the history of a cell.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kvbench.autopsies import AUTOPSY_FILE
from kvbench.durable import TEMPORARY
from kvbench.errors import ConfigError, RecordError
from kvbench.records import MEASURED, read_record
from kvbench.sinks.claim_file import owner_is_dead, parse_claim

_TEMPORARY_AFTER_S = 3600.0  # a writer needs seconds
_CLAIM_AFTER_S = 86_400.0  # the longest lease there is


@dataclass(frozen=True, kw_only=True, slots=True)
class Leftover:
    """A file or folder to remove, why, and how much it takes."""

    path: Path
    reason: str
    size_bytes: int


def leftovers(results: Path) -> list[Leftover]:
    """Return what may be removed under `results`, sorted by path. Raises: ConfigError for a missing folder."""
    if not results.is_dir():
        raise ConfigError(f"the results folder {results} does not exist; run a sweep first or give the right folder.")
    now_s = _now_s(results)
    abandoned = list(_claims(results, now_s))
    dead = {path for path, _ in abandoned}
    found = [*_temporary(results, now_s), *abandoned, *_batches(results, dead), *_autopsies(results, dead)]
    sized = [Leftover(path=path, reason=reason, size_bytes=_size_bytes(path)) for path, reason in found]
    return sorted(sized, key=lambda leftover: leftover.path)


def remove(leftover: Leftover) -> bool:
    """Remove it; False if it could not be, or was gone already."""
    try:
        if leftover.path.is_dir():
            shutil.rmtree(leftover.path)
        else:
            leftover.path.unlink()
    except OSError:
        return False
    return True


def _temporary(results: Path, now_s: float) -> Iterator[tuple[Path, str]]:
    folders = ("", "cells/*/", "cells/*/batches/", "claims/", "frontier/", "report/", "report/plots/", "wandb/s*/")
    patterns = (*(f"{folder}.*{TEMPORARY}" for folder in folders), "full_answers/.*")
    for pattern in patterns:
        for path in results.glob(pattern):
            if _age_s(path, now_s) > _TEMPORARY_AFTER_S:
                yield path, "a write that was killed"


def _claims(results: Path, now_s: float) -> Iterator[tuple[Path, str]]:
    for path in results.glob("claims/[!.]*"):
        with contextlib.suppress(OSError):
            found = parse_claim(path.read_bytes())
            if owner_is_dead(found):
                yield path, f"the lease of {found.owner}, which is gone"
            elif _age_s(path, now_s) > _CLAIM_AFTER_S:
                yield path, f"the lease of {found.owner}, which stood still for a day"


def _batches(results: Path, dead: set[Path]) -> Iterator[tuple[Path, str]]:
    for folder in results.glob("cells/*/batches"):
        # Whoever measures a finished cell afresh holds its lease; who was killed after the record left one too.
        if _held(results, folder.parent.name, dead):
            continue
        with contextlib.suppress(RecordError):
            if read_record(folder.parent / "record.json")["status"] in MEASURED:
                yield folder, "batches of a cell that has its record"


def _autopsies(results: Path, dead: set[Path]) -> Iterator[tuple[Path, str]]:
    for path in results.glob(f"cells/*/{AUTOPSY_FILE}"):
        if not _held(results, path.parent.name, dead) and not (path.parent / "record.json").exists():
            yield path, "the autopsy of a cell that was never finished"


def _held(results: Path, cell: str, dead: set[Path]) -> bool:
    return bool(set(results.glob(f"claims/{cell}.*")) - dead)


def _now_s(folder: Path) -> float:
    """Return the time by the clock that dates the files in `folder`, which may be a server's and not this machine's."""
    try:
        with tempfile.TemporaryFile(dir=folder) as dated:
            return os.fstat(dated.fileno()).st_mtime
    except OSError:  # nothing can be written there, nor removed
        return time.time()


def _age_s(path: Path, now_s: float) -> float:
    try:
        return now_s - path.stat().st_mtime
    except OSError:
        return 0.0


def _size_bytes(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    total = 0
    for file in files:
        with contextlib.suppress(OSError):
            total += file.stat().st_size
    return total
