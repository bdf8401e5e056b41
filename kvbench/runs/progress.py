"""Two progress bars: the sweep's cells, and the cell that is running now."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from kvbench.runs.cell import Cell

_SWEEP_FORMAT = "{desc} {n:.1f}/{total} |{bar}| {elapsed}<{remaining}"
_CELL_FORMAT = "{desc:<40.40} |{bar}| {percentage:3.0f} %"


class Progress:
    """Bars on a terminal; silent elsewhere, where the console's line per cell is enough.

    Cells of a group come forward together, so a cell's share is kept when another one is shown.
    """

    def __init__(self, cells: Mapping[str, Cell]) -> None:
        self._all = cells
        self._sweep = _bar(0, len(cells), "sweep", _SWEEP_FORMAT)
        self._cell = _bar(1, 1, "", _CELL_FORMAT)
        self._tasks: dict[str, float] = {}
        self._shown: str | None = None
        self._num_finished = 0

    def set_finished(self, num_cells: int) -> None:
        """Count cells that were done before."""
        self._num_finished = num_cells
        self._draw()

    def show(self, key: str) -> None:
        """Show the cell `key`, which runs now."""
        self._tasks.setdefault(key, 0.0)
        if key != self._shown:
            self._shown = key
            self._draw()

    def advance(self, key: str, tasks: float) -> None:
        """Move a cell by a share of a task."""
        if key in self._tasks:
            self._tasks[key] += tasks
            self._draw()

    def finish(self, key: str) -> None:
        """Count the cell as done."""
        self._tasks.pop(key, None)
        self._num_finished += 1
        self._draw()

    def close(self) -> None:
        """Close both bars."""
        self._cell.close()
        self._sweep.close()

    def _draw(self) -> None:
        self._sweep.n = min(self._num_finished + sum(map(self._share, self._tasks)), float(self._sweep.total or 0))
        shown = self._shown if self._shown in self._tasks else None
        self._cell.n = self._share(shown) if shown else 0.0
        self._cell.set_description_str(f"  {self._all[shown].name}" if shown else "", refresh=False)
        self._sweep.refresh()
        self._cell.refresh()

    def _share(self, key: str) -> float:
        return min(1.0, self._tasks[key] / len(self._all[key].tasks))


def _bar(position: int, total: int, name: str, form: str) -> tqdm[Any]:
    return tqdm(total=total, desc=name, position=position, disable=None, bar_format=form, leave=False)
