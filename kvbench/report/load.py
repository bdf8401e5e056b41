"""Read a results folder: every accepted record, and every file that could not be used and why.

A damaged or foreign file costs its own cell only; it is listed as a problem and the rest is reported.

    results = load_results(Path("results"), sweep="first")
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvbench.errors import ConfigError, RecordError, close_matches
from kvbench.measures import MEASURES
from kvbench.report.cell import CellResult, parse_cell
from kvbench.report.frontier import Frontier
from kvbench.report.naming import ordered
from kvbench.results.record import CellRecord, read_cell


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """A file (path relative to the results folder) that was not used, or not wholly, and why."""

    path: str
    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """The cells of one model on one data set: the only ones whose numbers may be compared."""

    model: str
    dataset: str
    cells: tuple[CellResult, ...]

    @property
    def title(self) -> str:
        """Return the heading of the group."""
        return f"{self.model} on {self.dataset}"

    @property
    def full(self) -> CellResult | None:
        """The full cache's cell, if it was run and did not fail; of several the one with most measurements."""
        found = [cell for cell in self.cells if cell.is_full and not cell.failed]
        return max(found, key=lambda cell: len(cell.measurements), default=None)

    @property
    def budgeted(self) -> tuple[CellResult, ...]:
        """Every cell but those of the full cache."""
        return tuple(cell for cell in self.cells if not cell.is_full)

    @property
    def by_budget(self) -> dict[str, list[CellResult]]:
        """Return the budgeted cells by budget, the smallest first, each in table order; failed ones too."""
        found: dict[str, list[CellResult]] = {}
        for cell in sorted(self.budgeted, key=lambda cell: cell.budget_order):
            found.setdefault(cell.budget, []).append(cell)
        return found

    def series_label(self, cell: CellResult) -> str:
        """Return the policy, with positions where they are not the original ones or its cells differ in them."""
        several = len({other.positions for other in self.cells if other.policy == cell.policy}) > 1
        several = several or cell.positions != "original"
        extras = [text for text in (cell.positions if several else "", cell.variant) if text]
        return f"{cell.policy} ({', '.join(extras)})" if extras else cell.policy

    def by_series(self) -> dict[str, list[CellResult]]:
        """Return the cells by series label, in table order."""
        found: dict[str, list[CellResult]] = {}
        for cell in self.cells:
            found.setdefault(self.series_label(cell), []).append(cell)
        return found

    def cell_label(self, cell: CellResult) -> str:
        """Return series and budget."""
        return self.series_label(cell) if cell.is_full else f"{self.series_label(cell)}, {cell.budget}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """A cell that several folders hold: where it was taken from, and (folder, status, start) of the others."""

    key: str
    folder: str
    others: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Results:
    """All usable cells in table order, and the problems met while reading.

    Of several folders also what was chosen; `frontiers` are the searches for a smallest safe budget beside them;
    `sweep` is the one that was asked for, None for all.
    """

    records: tuple[CellResult, ...]
    problems: tuple[Problem, ...]
    folders: tuple[str, ...] = ("",)
    choices: tuple[Choice, ...] = ()
    frontiers: tuple[Frontier, ...] = ()
    sweep: str | None = None

    @property
    def groups(self) -> tuple[Group, ...]:
        """Return the cells by model and data set."""
        by_name = itertools.groupby(self.records, key=lambda cell: (cell.model, cell.dataset))
        return tuple(Group(model=model, dataset=data, cells=tuple(cells)) for (model, data), cells in by_name)

    @property
    def policies(self) -> tuple[str, ...]:
        """Return every policy name, in table order."""
        return tuple(dict.fromkeys(sorted((c.policy for c in self.records), key=lambda name: (name != "full", name))))


def load_results(folder: Path, *, sweep: str | None = None, keys: Collection[str] | None = None) -> Results:
    """Read what counts of every cell below `folder`/cells, only of `sweep` or with a key in `keys` where given.

    Raises: ConfigError if the folder is missing or no record belongs to `sweep`.
    """
    cells, problems = read_cells(folder, keys=keys)
    return results_of(cells, problems, sweep)


def read_cells(folder: Path, *, keys: Collection[str] | None = None) -> tuple[list[CellResult], list[Problem]]:
    """Return the cells of one folder as they lie there, and its problems. Raises: ConfigError if it is missing."""
    if not folder.is_dir():
        raise ConfigError(f"the results folder {folder} does not exist; run a sweep first or give the right folder.")
    cells: list[CellResult] = []
    problems: list[Problem] = []
    for path in sorted((folder / "cells").glob("*/record.json")):
        name = path.relative_to(folder).as_posix()
        try:
            found = read_cell(path.parent)
            if keys is None or found.body["key"] in keys:
                cells.append(replace(parse_cell(found.body), cell_folder=path.parent))
        except RecordError as error:
            problems.append(Problem(path=name, message=str(error).removeprefix(f"{path} ")))
        else:
            problems.extend(Problem(path=name, message=text) for text in _doubts(found.body, path))
            if keys is None or found.body["key"] in keys:
                problems.extend(_later_failures(found, path.parent.relative_to(folder).as_posix()))
    return cells, problems


def results_of(cells: list[CellResult], problems: list[Problem], sweep: str | None) -> Results:
    """Return cells of `sweep` in table order. Raises: ConfigError if no record belongs to it."""
    return Results(records=ordered(_only(cells, sweep)), problems=tuple(problems), sweep=sweep)


def _only(cells: list[CellResult], sweep: str | None) -> list[CellResult]:
    if sweep is None:
        return cells
    chosen = [cell for cell in cells if cell.sweep == sweep]
    if not chosen:
        known = close_matches(sweep, {cell.sweep for cell in cells})
        raise ConfigError(f"no record belongs to the sweep {sweep!r}; {known}")
    return chosen


def _later_failures(found: CellRecord, folder: str) -> Iterator[Problem]:
    """Yield that the cell was tried again in vain; its numbers stay those that were measured."""
    for body in found.later_failures:
        error = body["error"] or {}
        why = " ".join(f"{error.get('type', '')} {error.get('message', '')}".split())[:160]
        message = (
            f"this later attempt of {body['started_utc'][:19]} failed ({body['status']}{': ' if why else ''}{why}); "
            f"the cell's numbers are those measured at {found.body['started_utc'][:19]}"
        )
        yield Problem(path=f"{folder}/attempt-{body['attempt']}.json", message=message)


def _doubts(body: Mapping[str, Any], path: Path) -> Iterator[str]:
    """Yield what is odd about a record that can still be used."""
    for name in sorted(set(body["measurements"]) - set(MEASURES)):
        yield f"unknown measurement {name!r} is not shown; {close_matches(name, MEASURES)}"
    if not body["key"].startswith(path.parent.name):
        yield f"the record's key starts with {body['key'][:16]}, not with its folder's name; was it moved?"
