"""The worker's side of a group: run its cells and tell the parent every step."""

from __future__ import annotations

from collections.abc import Sequence

from kvbench.runs.cell import Cell
from kvbench.runs.environment import environment
from kvbench.runs.group import ModelShelf, run_group
from kvbench.runs.group_plan import GroupPlan
from kvbench.runs.worker_pipe import PipeWatcher


def serve(cells: Sequence[Cell], plan: GroupPlan, watcher: PipeWatcher) -> None:
    """Run one group and say goodbye."""
    watcher.hello(environment(cells[0].device))
    run_group(cells, plan, shelf=ModelShelf(), watcher=watcher)
    watcher.bye()
