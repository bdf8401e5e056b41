"""Read every file that a sweep left and say which ones must not be believed, and why; nothing is changed.

for problem in verify(Path("results")).problems:
print(problem.path, problem.message)
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvbench.autopsies import AUTOPSY_FILE, read_autopsy
from kvbench.durable import TEMPORARY
from kvbench.errors import ConfigError, RecordError
from kvbench.frontier_file import KIND, VERSION
from kvbench.records import cell_key, read_record
from kvbench.sealed import unseal
from kvbench.sinks.partial import PartialStore

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
