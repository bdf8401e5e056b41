"""A results folder looked after: which files must not be believed, and what killed processes left behind.

    for problem in verify(Path("results")).problems:
        print(problem.path, problem.message)
    for leftover in leftovers(Path("results")):
        remove(leftover)

`verify` reads every file that a sweep left and changes nothing. Leftovers are found first and removed only on request:
half-written temporary files, leases of owners that are gone, batches of cells that have their record, autopsies of
cells that have none. Attempts are never leftovers: they are the history of a cell.
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

from kvbench.errors import RecordError
from kvbench.results.claims import owner_is_dead, parse_claim
from kvbench.results.files import TEMPORARY, unseal
from kvbench.results.frontier import KIND, VERSION
from kvbench.results.record import (
    AUTOPSY_FILE,
    MEASURED,
    RECORD_FILE,
    Problem,
    cell_key,
    check_results_folder,
    read_autopsy,
    read_cell,
    read_record,
)
from kvbench.results.store import PartialStore

_TEMPORARY_AFTER_S = 3600.0  # a writer needs seconds
_CLAIM_AFTER_S = 86_400.0  # the longest lease there is
_CELL = re.compile(r"[0-9a-f]{16}")
_ATTEMPT = re.compile(r"attempt-([0-9a-f]{32})\.json")


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
    check_results_folder(results)
    cells = [_Cell(folder) for folder in sorted((results / "cells").glob("*"))]
    found = [(path, message) for cell in cells for path, message in cell.problems()]
    for path in sorted((results / "frontier").glob("*.json")):
        try:
            unseal(path, KIND, VERSION, "Run the same command again.")
        except RecordError as error:
            found.append((path, str(error).removeprefix(f"{path} ")))
    return Verified(
        num_records=sum(cell.has_record for cell in cells),
        num_attempts=sum(len(cell.attempts) for cell in cells),
        problems=tuple(Problem(path=path.relative_to(results).as_posix(), message=message) for path, message in found),
    )


class _Cell:
    """One folder under cells/."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.attempts: dict[str, dict[str, Any]] = {}
        self.has_record = False

    def problems(self) -> Iterator[tuple[Path, str]]:
        """Yield what is wrong; fills in the counts."""
        if not self.folder.is_dir() or not _CELL.fullmatch(self.folder.name):
            yield self.folder, "is not the folder of a cell. Move it out of the results folder."
            return
        for path in sorted(self.folder.iterdir(), key=lambda path: (path.name == RECORD_FILE, path.name)):
            try:
                yield from ((path, message) for message in self._of(path))
            except RecordError as error:
                yield path, str(error).removeprefix(f"{path} ")

    def _of(self, path: Path) -> Iterator[str]:
        """Yield what is wrong with a file of the cell. Raises: RecordError for one that cannot be used."""
        named = _ATTEMPT.fullmatch(path.name)
        if path.name == RECORD_FILE or named is not None:
            yield from self._of_record(read_record(path), None if named is None else named[1])
        elif path.name == "batches":
            yield from self._of_batches(path)
        elif path.name == AUTOPSY_FILE:
            yield from self._of_another(read_autopsy(path))
        elif path.name.startswith("damaged-"):
            yield "was in the place of a record and could not be used. Delete it when you know why."
        elif not path.name.endswith(TEMPORARY):
            yield "is not a file of kvbench. Move it out of the results folder."

    def _of_another(self, body: dict[str, Any]) -> list[str]:
        foreign = not body["key"].startswith(self.folder.name)
        return [f"belongs to the cell {body['key'][:16]}. Move it there."] if foreign else []

    def _of_record(self, body: dict[str, Any], attempt: str | None) -> Iterator[str]:
        if foreign := self._of_another(body):
            yield from foreign
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

    def _of_batches(self, folder: Path) -> Iterator[str]:
        key = next((body["key"] for body in self.attempts.values()), None)
        for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
            try:
                PartialStore.read(path, key)
            except RecordError as error:
                yield f"holds a batch that cannot be used: {path.name} {str(error).removeprefix(f'{path} ')}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Leftover:
    """A file or folder to remove, why, and how much it takes."""

    path: Path
    reason: str
    size_bytes: int


def leftovers(results: Path) -> list[Leftover]:
    """Return what may be removed under `results`, sorted by path. Raises: ConfigError for a missing folder."""
    check_results_folder(results)
    now_s = _now_s(results)
    abandoned = list(_claims(results, now_s))
    found = [*_temporary(results, now_s), *abandoned, *_of_cells(results, {path for path, _ in abandoned})]
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
    for pattern in (*(f"{folder}.*{TEMPORARY}" for folder in folders), "full_answers/.*"):
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


def _of_cells(results: Path, dead: set[Path]) -> Iterator[tuple[Path, str]]:
    for path in [*results.glob("cells/*/batches"), *results.glob(f"cells/*/{AUTOPSY_FILE}")]:
        # Whoever measures a finished cell afresh holds its lease; who was killed after the record left one too.
        if set(results.glob(f"claims/{path.parent.name}.*")) - dead:
            continue
        if path.name == AUTOPSY_FILE:
            if not (path.parent / RECORD_FILE).exists():
                yield path, "the autopsy of a cell that was never finished"
            continue
        with contextlib.suppress(RecordError):
            if read_cell(path.parent).body["status"] in MEASURED:
                yield path, "batches of a cell that has its record"


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
    total = 0
    for file in path.rglob("*") if path.is_dir() else [path]:
        with contextlib.suppress(OSError):
            total += file.stat().st_size
    return total
