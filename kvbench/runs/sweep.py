"""A sweep: run what is missing, commit each cell at once, show it, go on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from kvbench.durable import make_folder
from kvbench.runs.cell import Cell, ModelShelf, run_cell
from kvbench.runs.progress import Progress
from kvbench.sinks.base import SinkGroup
from kvbench.sinks.console import say
from kvbench.sinks.store import RecordStore


class Sweep:
    """The cells of one invocation, by key."""

    def __init__(self, *, name: str, results: Path, cells: Mapping[str, Cell], sinks: SinkGroup, force: bool) -> None:
        self._name = name
        self._results = results
        self._cells = cells
        self._store = RecordStore(results)
        self._sinks = sinks
        self._force = force
        self._shelf = ModelShelf()
        self._progress: Progress | None = None
        self._ended: dict[str, str] = {}
        self.num_reused = 0

    def open(self) -> None:
        """Make the results folder, start bars and sinks, and take every accepted record there is.

        Raises: ConfigError for a folder that cannot be made.
        """
        make_folder(self._results)
        self._progress = Progress(len(self._cells))
        self._sinks.open(self._name, len(self._cells))
        for key in self._cells:
            if not self._force and self._store.accepted(key) is not None:
                self._finish(key, "ok")
                self.num_reused += 1

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to run."""
        return len(self._ended) == len(self._cells)

    @property
    def statuses(self) -> dict[str, str]:
        """How each cell that ended did so, by key, in the order of the cells."""
        return {key: self._ended[key] for key in self._cells if key in self._ended}

    def run(self, key: str) -> None:
        """Run the cell `key`; one that is done, or was run before, is left alone."""
        assert self._progress is not None
        if key in self._ended:
            return
        cell = self._cells[key]
        self._progress.start_cell(f"{cell.labels['policy']} at {cell.labels['budget']}", len(cell.tasks))
        body = run_cell(
            cell, shelf=self._shelf, results=self._results, sweep=self._name, advance=self._progress.advance
        )
        self._store.commit(body, replace=self._force)
        self._finish(key, body["status"])
        self._sinks.record(body)

    def _finish(self, key: str, status: str) -> None:
        assert self._progress is not None
        self._ended[key] = status
        self._progress.finish_cell()

    def close(self) -> None:
        """Close bars and sinks, and say what was reused."""
        if self._progress is not None:
            self._progress.close()
        self._sinks.close()
        if self.num_reused:
            say(
                f"{self.num_reused} of {len(self._cells)} cells were done already (records under "
                f"{self._results}/cells); force=true measures again"
            )

    @property
    def num_failed(self) -> int:
        """Cells whose status is not ok."""
        return sum(status != "ok" for status in self.statuses.values())
