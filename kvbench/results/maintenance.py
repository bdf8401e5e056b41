"""What killed processes leave behind and nobody needs: found first, removed only on request.

Half-written temporary files, leases of owners that are gone, batches of cells that have their record, autopsies
of cells that have none.
Attempts are never leftovers: they are the history of a cell.

Read every file that a sweep left and say which ones must not be believed, and why; nothing is changed.

for problem in verify(Path("results")).problems:
print(problem.path, problem.message)
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvbench.errors import ConfigError, RecordError
from kvbench.frontier.table import KIND, VERSION
from kvbench.results.claims import owner_is_dead, parse_claim
from kvbench.results.files import TEMPORARY, unseal
from kvbench.results.record import AUTOPSY_FILE, MEASURED, cell_key, read_autopsy, read_cell, read_record
from kvbench.results.store import PartialStore

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
            if read_cell(folder.parent).body["status"] in MEASURED:
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


_CELL = re.compile(r"[0-9a-f]{16}")
_ATTEMPT = re.compile(r"attempt-([0-9a-f]{32})\.json")


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """A file, as a path relative to the results folder, and what is wrong with it."""

    path: str
    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Verified:
    """How many cells have a record that holds, how many attempts do, and all that does not."""

    num_records: int
    num_attempts: int
    problems: tuple[Problem, ...]


def verify(results: Path) -> Verified:
    """Check length, checksum, version, key and place of every record, attempt, batch, autopsy and frontier.

    Raises: ConfigError if the folder does not exist.
    """
    if not results.is_dir():
        raise ConfigError(f"the results folder {results} does not exist; run a sweep first or give the right folder.")
    cells = [_Cell(folder) for folder in sorted((results / "cells").glob("*"))]
    problems = [
        Problem(path=path.relative_to(results).as_posix(), message=message)
        for cell in cells
        for path, message in cell.problems()
    ]
    problems.extend(_frontier_problems(results))
    return Verified(
        num_records=sum(cell.has_record for cell in cells),
        num_attempts=sum(len(cell.attempts) for cell in cells),
        problems=tuple(problems),
    )


def _frontier_problems(results: Path) -> Iterator[Problem]:
    for path in sorted((results / "frontier").glob("*.json")):
        try:
            unseal(path, KIND, VERSION, "Run the same command again.")
        except RecordError as error:
            yield Problem(path=path.relative_to(results).as_posix(), message=str(error).removeprefix(f"{path} "))


class _Cell:
    """One folder under cells/."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.attempts: dict[str, dict[str, Any]] = {}
        self.has_record = False

    def problems(self) -> list[tuple[Path, str]]:
        """Return what is wrong; fills in the counts."""
        if not self.folder.is_dir() or not _CELL.fullmatch(self.folder.name):
            return [(self.folder, "is not the folder of a cell. Move it out of the results folder.")]
        names = sorted(self.folder.iterdir(), key=lambda path: (path.name == "record.json", path.name))
        return [(path, message) for path in names for message in self._of(path)]

    def _of(self, path: Path) -> Iterator[str]:
        named = _ATTEMPT.fullmatch(path.name)
        if path.name == "record.json" or named is not None:
            yield from self._of_record(path, None if named is None else named[1])
        elif path.name == "batches":
            yield from self._of_batches(path)
        elif path.name == AUTOPSY_FILE:
            yield from self._of_autopsy(path)
        elif path.name.startswith("damaged-"):
            yield "was in the place of a record and could not be used. Delete it when you know why."
        elif not path.name.endswith(TEMPORARY):
            yield "is not a file of kvbench. Move it out of the results folder."

    def _of_record(self, path: Path, attempt: str | None) -> Iterator[str]:
        try:
            body = read_record(path)
        except RecordError as error:
            yield str(error).removeprefix(f"{path} ")
            return
        if not body["key"].startswith(self.folder.name):
            yield f"belongs to the cell {body['key'][:16]}. Move it there."
        elif body["key"] != cell_key(body["cell"], body["schema"]):
            yield "has settings that do not give its key: key or settings were changed. Run its cell again."
        elif attempt is not None and body["attempt"] != attempt:
            yield f"is the attempt {body['attempt']}. Rename it back."
        elif attempt is not None:
            self.attempts[attempt] = body
        elif self.attempts.get(body["attempt"]) != body:
            yield "is none of the attempts beside it. Was one of them deleted?"
        else:
            self.has_record = True

    def _of_autopsy(self, path: Path) -> Iterator[str]:
        try:
            body = read_autopsy(path)
        except RecordError as error:
            yield str(error).removeprefix(f"{path} ")
            return
        if not body["key"].startswith(self.folder.name):
            yield f"belongs to the cell {body['key'][:16]}. Move it there."

    def _of_batches(self, folder: Path) -> Iterator[str]:
        key = next((body["key"] for body in self.attempts.values()), None)
        for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
            try:
                PartialStore.read(path, key)
            except RecordError as error:
                yield f"holds a batch that cannot be used: {path.name} {str(error).removeprefix(f'{path} ')}"
