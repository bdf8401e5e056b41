"""Two progress bars: the sweep's cells, and the cell that is running now."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

_SWEEP_FORMAT = "{desc} {n:.1f}/{total} |{bar}| {elapsed}<{remaining}"
_CELL_FORMAT = "{desc:<40.40} |{bar}| {percentage:3.0f} %"


@dataclass(kw_only=True)
class _Cell:
    name: str
    num_tasks: int
    tasks: float = 0.0


class Progress:
    """Bars on a terminal; silent elsewhere, where the console's line per cell is enough.

    Cells of a group come forward together, so a cell's share is kept when another one is shown.
    """

    def __init__(self, num_cells: int) -> None:
        self._sweep = _bar(0, num_cells, "sweep", _SWEEP_FORMAT)
        self._cell = _bar(1, 1, "", _CELL_FORMAT)
        self._cells: dict[str, _Cell] = {}
        self._shown: str | None = None
        self._num_finished = 0

    def set_finished(self, num_cells: int) -> None:
        """Count cells that were done before."""
        self._num_finished = num_cells
        self._draw()

    def show(self, key: str, name: str, num_tasks: int) -> None:
        """Show the cell `key`, which runs now."""
        self._cells.setdefault(key, _Cell(name=name, num_tasks=num_tasks))
        if key != self._shown:
            self._shown = key
            self._draw()

    def advance(self, key: str, tasks: float) -> None:
        """Move a cell by a share of a task."""
        if key in self._cells:
            self._cells[key].tasks += tasks
            self._draw()

    def finish(self, key: str) -> None:
        """Count the cell as done."""
        self._cells.pop(key, None)
        self._num_finished += 1
        self._draw()

    def close(self) -> None:
        """Close both bars."""
        self._cell.close()
        self._sweep.close()

    def _draw(self) -> None:
        shares = sum(min(1.0, cell.tasks / cell.num_tasks) for cell in self._cells.values())
        self._sweep.n = min(self._num_finished + shares, float(self._sweep.total or 0))
        shown = self._cells.get(self._shown or "")
        self._cell.n = min(1.0, shown.tasks / shown.num_tasks) if shown else 0.0
        self._cell.set_description_str(f"  {shown.name}" if shown else "", refresh=False)
        self._sweep.refresh()
        self._cell.refresh()


def _bar(position: int, total: int, name: str, form: str) -> tqdm[Any]:
    return tqdm(total=total, desc=name, position=position, disable=None, bar_format=form, leave=False)
