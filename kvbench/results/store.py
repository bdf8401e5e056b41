"""The results on disk: every attempt of every cell, which attempt counts, and what must not be believed. The truth.

    results/cells/<key[:16]>/attempt-<uuid>.json       one immutable file per attempt
    results/cells/<key[:16]>/record.json               hard link to the accepted attempt
    results/cells/<key[:16]>/batches/<number>.json     one finished batch of a cell that is still being measured

A failed attempt is never put in the place of a measured one, whether or not it was asked for. Batches make a kill
cost one of them: only for numbers that are a function of the cell (quality), as timing and memory are never stitched
together from two processes. They go when the cell's ok record is committed.

Safe with many writers on one folder and with a kill at any instant: linking to a name that exists
fails, so of two processes that finish the same cell exactly one is accepted.

    store = RecordStore(Path("results"))
    if store.accepted(key) is None:
        store.commit(body)
    PartialStore(Path("results"), key).commit(3, {"nll_sum": [1.5, 2.5]})

A folder is looked after, which killed processes left things in:

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
import logging
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvbench.errors import RecordError
from kvbench.results.claims import owner_is_dead, parse_claim
from kvbench.results.files import TEMPORARY, holding, link_new, link_over, seal, storage_error, sync, unseal, write_new
from kvbench.results.frontier import KIND, VERSION
from kvbench.results.record import (
    AUTOPSY_FILE,
    MEASURED,
    RECORD_FILE,
    Problem,
    cell_folder,
    cell_key,
    check_body,
    check_results_folder,
    counting,
    read_autopsy,
    read_cell,
    read_record,
    write_record,
)
from kvbench.results.redaction import redacted_body

_KIND, _VERSION = "kvbench_batch", 1
_REMEDY = "It is measured again."
_NUM_TRIES = 3
_log = logging.getLogger(__name__)


class PartialStore:
    """The batches of the cell `key` under the results folder."""

    def __init__(self, results: Path, key: str) -> None:
        self.folder = cell_folder(Path(results), key) / "batches"
        self._key = key

    def batches(self) -> dict[int, dict[str, Any]]:
        """Return the payload of every whole batch by number; others are reported and left out."""
        bodies = [body for path in sorted(self.folder.glob("*.json")) if (body := self._whole(path)) is not None]
        return {body["number"]: body["payload"] for body in sorted(bodies, key=lambda body: int(body["number"]))}

    def commit(self, number: int, payload: Mapping[str, Any]) -> None:
        """Store the batch `number` durably; one that is there and whole stays as it is.

        Raises: RecordError (payload that JSON cannot hold, disk), ConfigError (folder).
        """
        path = self.folder / f"{number}.json"
        data = seal(_KIND, _VERSION, {"key": self._key, "number": number, "payload": dict(payload)})
        for _ in range(_NUM_TRIES):
            try:
                write_new(path, data)
                return
            except FileExistsError:
                if self._whole(path) is not None:
                    return
                with contextlib.suppress(OSError):
                    _set_aside(path)
            except RecordError as error:
                # Another process finished this very cell and removed the folder under our hands.
                if not isinstance(error.__cause__, FileNotFoundError):
                    raise
        raise RecordError(f"cannot write {path}: the folder keeps changing. Run again; finished cells are kept.")

    def remove(self) -> None:
        """Remove all batches: after the cell's record, or before it is measured afresh on request."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _whole(self, path: Path) -> dict[str, Any] | None:
        try:
            return self.read(path, self._key)
        except RecordError as error:
            _log.warning("%s", error)
            return None

    @staticmethod
    def read(path: Path, key: str | None) -> dict[str, Any]:
        """Return the envelope's body of one batch of the cell `key`, of any cell for None. Raises: RecordError."""
        body = unseal(path, _KIND, _VERSION, _REMEDY)
        if key is not None and body.get("key") != key:
            raise RecordError(f"{path} belongs to another cell. {_REMEDY}")
        number, payload = body.get("number"), body.get("payload")
        if not isinstance(number, int) or path.stem != str(number) or not isinstance(payload, dict):
            raise RecordError(f"{path} is no batch {path.stem}. {_REMEDY}")
        return body


def _set_aside(damaged: Path) -> None:
    """Rename what is in the place of a record or batch, which may be someone's file or folder, and keep it."""
    damaged.rename(damaged.with_name(f"damaged-{uuid.uuid4().hex}"))


class RecordStore:
    """All records under the results folder `folder`, which is created by the first commit."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._reported: set[Path] = set()

    def cell_folder(self, key: str) -> Path:
        """Return the folder that holds the attempts of the cell `key`."""
        return cell_folder(self.folder, key)

    def record_file(self, key: str) -> Path:
        """Return where the accepted record of `key` lies, if it has one."""
        return self.cell_folder(key) / RECORD_FILE

    def accepted(self, key: str) -> dict[str, Any] | None:
        """Return the record of `key` that counts if it verifies and did not fail; a damaged one is reported once."""
        accepted = self._read(self.record_file(key), key)
        if accepted is None:
            return None
        body = accepted if accepted["status"] in MEASURED else counting(accepted, self.attempts(key)).body
        return body if body["status"] in MEASURED else None

    def attempts(self, key: str) -> list[dict[str, Any]]:
        """Return all readable attempts of `key`, oldest first; a damaged one is reported once."""
        paths = sorted(self.cell_folder(key).glob("attempt-*.json"))
        bodies = [body for path in paths if (body := self._read(path, key)) is not None]
        return sorted(bodies, key=lambda body: str(body["started_utc"]))

    def commit(self, body: Mapping[str, Any], *, replace: bool = False) -> Path:
        """Store one attempt durably, without secrets, and return its file; it counts unless a measured one does.

        An accepted record that failed, or is damaged, gives way to any newer attempt; one that is ok or noisy
        only if `replace`, and to a measured one alone. When this returns, a crash of the machine no longer
        loses the attempt, and the batches of a measured cell are gone.
        Raises: RecordError (wrong body, disk), ConfigError (folder), FileExistsError (attempt id reused).
        """
        check_body(body)
        folder = self.cell_folder(body["key"])
        attempt = folder / f"attempt-{body['attempt']}.json"
        write_record(attempt, redacted_body(body))
        try:
            self._accept(attempt, body, replace)
            sync(folder)
        except OSError as error:
            raise storage_error(folder / RECORD_FILE, error) from error
        if body["status"] in MEASURED:
            PartialStore(self.folder, body["key"]).remove()
        return attempt

    def _accept(self, attempt: Path, body: Mapping[str, Any], replace: bool) -> None:
        accepted = attempt.with_name(RECORD_FILE)
        # "Is it measured?" and "replace it" are one step among processes. Without locks only a replacement can be lost
        # to a simultaneous one; the first acceptance needs none.
        with holding(os.open(attempt.parent, os.O_RDONLY)):
            try:
                link_new(attempt, accepted)
            except FileExistsError:
                current = self._read(accepted, body["key"])
                if current is None:
                    with contextlib.suppress(FileNotFoundError):
                        _set_aside(accepted)
                elif current["status"] in MEASURED and not (replace and body["status"] in MEASURED):
                    return
                elif current["status"] not in MEASURED:
                    # The newest measured one, should an earlier kvbench have let a failure take its place.
                    counts = counting(dict(body), self.attempts(body["key"])).body
                    measured = attempt.with_name(f"attempt-{counts['attempt']}.json")
                    attempt = measured if measured.is_file() else attempt
                link_over(attempt, accepted)

    def _read(self, path: Path, key: str) -> dict[str, Any] | None:
        if not os.path.lexists(path):
            return None
        try:
            body = read_record(path)
            if body["key"] != key:
                raise RecordError(f"{path} belongs to another cell ({body['key']}). Move it out of the results folder.")
        except RecordError as error:
            if path not in self._reported:
                self._reported.add(path)
                _log.warning("%s Until then it counts as missing.", error)
            return None
        return body


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
