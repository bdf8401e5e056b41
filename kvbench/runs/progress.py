"""How far a sweep is: cells, batches, how fast, and how long it will take.

Two bars on a terminal, the sweep's cells and the cell that is running now. Elsewhere plain lines, from the first
batch on and then seldom enough to leave a log readable:

    0 of 16 cells, 5 of 320 batches, 1.2 batches/s, about 4 min left: h2o at 20 % of seen
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from tqdm import tqdm

from kvbench.runs.cell import Cell
from kvbench.sinks.console import say

_SWEEP_FORMAT = "{desc} {n:.1f}/{total} |{bar}| {elapsed}{postfix}"
_CELL_FORMAT = "{desc:<40.40} |{bar}| {percentage:3.0f} %"
_LINE_EVERY_S = 10.0
_LINE_EVERY_FRACTION = 0.05  # of the time so far, so that a long sweep writes some dozen lines more, not thousands


class Progress:
    """Bars on a terminal, lines elsewhere; nothing runs by itself, so nothing is drawn while a worker is silent.

    Cells of a group come forward together, so a cell's share is kept when another one is shown. What was done before
    counts as done and not as speed. now_s: the steady clock.
    """

    def __init__(self, cells: Mapping[str, Cell], *, now_s: Callable[[], float] = time.monotonic) -> None:
        self._all = cells
        self._now_s = now_s
        self._sweep = _bar(0, len(cells), "sweep", _SWEEP_FORMAT)
        self._cell = _bar(1, 1, "", _CELL_FORMAT)
        self._tasks: dict[str, float] = {}
        self._batches: dict[str, tuple[int, int]] = {}
        self._shown: str | None = None
        self._num_finished = 0
        self._start_s: float | None = None
        self._kept_cells, self._kept_batches = 0.0, 0
        self._next_line_s = 0.0

    def set_finished(self, num_cells: int) -> None:
        """Count cells that were done before."""
        self._kept_cells += num_cells - self._num_finished
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
        if key in self._all:
            self._tasks[key] = self._tasks.get(key, 0.0) + tasks
            self._draw(write_line=False)  # where it was a batch, its number follows

    def batches(self, key: str, done: int, total: int) -> None:
        """Take how many of a cell's batches are done; the first word about each is what was there before."""
        if key not in self._all:
            return
        if key not in self._batches:
            self._kept_cells += self._share(key) if key in self._tasks else 0.0
            self._kept_batches += done
        if self._start_s is None:  # the model is loaded now
            self._start_s = self._now_s()
        self._batches[key] = (done, total)
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

    @property
    def _share_done(self) -> float:
        """Cells that are done, and the shares of those that run."""
        return min(self._num_finished + sum(map(self._share, self._tasks)), float(len(self._all)))

    @property
    def _num_batches(self) -> tuple[int, int]:
        """Batches done and planned, of the cells that have begun."""
        return sum(done for done, _ in self._batches.values()), sum(total for _, total in self._batches.values())

    def _draw(self, *, write_line: bool = True) -> None:
        self._sweep.n = self._share_done
        shown = self._shown if self._shown in self._tasks else None
        self._cell.n = self._share(shown) if shown else 0.0
        if self._sweep.disable:
            if write_line:
                self._write_line(shown)
            return
        self._sweep.set_postfix_str(", ".join(self._words()), refresh=False)
        self._cell.set_description_str(f"  {self._all[shown].name}" if shown else "", refresh=False)
        self._sweep.refresh()
        self._cell.refresh()

    def _write_line(self, shown: str | None) -> None:
        now_s = self._now_s()
        if self._start_s is None or self._num_batches[0] <= self._kept_batches or now_s < self._next_line_s:
            return
        self._next_line_s = now_s + max(_LINE_EVERY_S, _LINE_EVERY_FRACTION * (now_s - self._start_s))
        cells = f"{self._num_finished} of {len(self._all)} cells"
        say(", ".join([cells, *self._words()]) + (f": {self._all[shown].name}" if shown else ""))

    def _words(self) -> list[str]:
        """Return batches, rate and time left, as far as they are known."""
        done, total = self._num_batches
        words = [f"{done} of {total} batches"] if total else []
        elapsed_s = 0.0 if self._start_s is None else self._now_s() - self._start_s
        if elapsed_s <= 0:
            return words
        if done > self._kept_batches:
            words.append(_rate((done - self._kept_batches) / elapsed_s))
        if (cells := self._share_done - self._kept_cells) > 0:
            words.append(f"about {_duration(elapsed_s * (len(self._all) - self._share_done) / cells)} left")
        return words

    def _share(self, key: str) -> float:
        return min(1.0, self._tasks[key] / len(self._all[key].tasks))


def _rate(per_s: float) -> str:
    return f"{per_s:.1f} batches/s" if per_s >= 1 else f"{1 / per_s:.1f} s/batch"


def _duration(time_s: float) -> str:
    minutes, seconds = divmod(round(time_s), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"


def _bar(position: int, total: int, name: str, form: str) -> tqdm[Any]:
    return tqdm(total=total, desc=name, position=position, disable=None, bar_format=form, leave=False)
