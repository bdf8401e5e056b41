"""What a running group of cells is given: who watches it, where batches are kept, where results go."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from kvbench.runs.batch_task import Payload


class Watcher(Protocol):
    """Is told what a group does; every call means that work goes on."""

    def active(self, key: str, phase: str, *, timed: bool = False) -> None:
        """From now on the time, and any sudden death, belong to the phase `phase` of the cell `key`.

        timed: returns only when nothing of the sweep works beside it, and until the next call nothing does.
        """

    def advance(self, key: str, tasks: float) -> None:
        """Note that the cell came further by a share of a task."""

    def batches(self, key: str, done: int, total: int) -> None:
        """Note that of the planned batches of a cell so many are done, those from before a kill included."""

    def beat(self) -> None:
        """Note that a step was made."""

    def done(self, body: dict[str, Any]) -> None:
        """Take the record of a cell that ended."""


class Batches(Protocol):
    """The committed batches of one cell."""

    def batches(self) -> Mapping[int, Payload]:
        """Return what was committed before, by number."""

    def commit(self, number: int, payload: Payload) -> None:
        """Keep one batch for good."""


@dataclass(frozen=True, kw_only=True)
class GroupPlan:
    """How groups run: where results go, whether prompts are shared, where batches are kept."""

    results: Path
    sweep: str
    share_prompts: bool
    batches_of: Callable[[str], Batches]
