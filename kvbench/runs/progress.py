"""Two progress bars: the sweep's cells, and the tasks of the running cell."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm

_SWEEP_FORMAT = "{desc} {n:.0f}/{total} |{bar}| {elapsed}<{remaining}"
_CELL_FORMAT = "{desc:<40.40} |{bar}| {percentage:3.0f} %"


class Progress:
    """Bars on a terminal; silent elsewhere, where the console's line per cell is enough."""

    def __init__(self, num_cells: int) -> None:
        self._sweep = tqdm(
            total=num_cells, desc="sweep", position=0, disable=None, bar_format=_SWEEP_FORMAT, leave=False
        )
        self._cell: tqdm[Any] | None = None

    def start_cell(self, name: str, num_tasks: int) -> None:
        """Begin the bar of one cell."""
        self._cell = tqdm(
            total=num_tasks, desc=f"  {name}", position=1, disable=None, bar_format=_CELL_FORMAT, leave=False
        )

    def advance(self, tasks: float) -> None:
        """Move the running cell's bar by a share of a task."""
        if self._cell is not None:
            self._cell.update(tasks)

    def finish_cell(self) -> None:
        """Close the cell's bar and count the cell."""
        if self._cell is not None:
            self._cell.close()
            self._cell = None
        self._sweep.update(1)

    def close(self) -> None:
        """Close both bars."""
        if self._cell is not None:
            self._cell.close()
        self._sweep.close()
