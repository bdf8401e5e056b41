"""A watcher that writes everything down, and batches kept in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvbench.results.record import check_body, encode_record
from kvbench.sweep.cell import Cell
from kvbench.sweep.group import GroupPlan, ModelShelf, run_group


class Notes:
    def __init__(self) -> None:
        self.phases: list[tuple[str, str]] = []
        self.tasks: dict[str, float] = {}
        self.bodies: dict[str, dict[str, Any]] = {}
        self.timed: list[str] = []
        self.num_beats = 0
        self.batches_told: list[tuple[str, int, int]] = []

    def active(self, key: str, phase: str, *, timed: bool = False) -> None:
        self.phases.append((key, phase))
        self.timed += [phase] if timed else []

    def advance(self, key: str, tasks: float) -> None:
        self.tasks[key] = self.tasks.get(key, 0.0) + tasks

    def batches(self, key: str, done: int, total: int) -> None:
        self.batches_told.append((key, done, total))

    def beat(self) -> None:
        self.num_beats += 1

    def done(self, body: dict[str, Any]) -> None:
        assert body["key"] not in self.bodies, "a cell ends once"
        check_body(body)
        encode_record(body)
        self.bodies[body["key"]] = body


class KeptInMemory:
    def __init__(self) -> None:
        self.kept: dict[int, dict[str, Any]] = {}

    def batches(self) -> dict[int, dict[str, Any]]:
        return dict(self.kept)

    def commit(self, number: int, payload: dict[str, Any]) -> None:
        self.kept[number] = payload


def run_cells(
    cells: Sequence[Cell],
    folder: Path,
    *,
    shelf: ModelShelf | None = None,
    share: bool = True,
    batches: dict[str, KeptInMemory] | None = None,
) -> Notes:
    kept = {} if batches is None else batches
    plan = GroupPlan(
        results=folder,
        sweep="s",
        share_prompts=share,
        batches_of=lambda key: kept.setdefault(key, KeptInMemory()),
    )
    notes = Notes()
    run_group(cells, plan, shelf=shelf or ModelShelf(), watcher=notes)
    assert set(notes.bodies) == {cell.key for cell in cells}
    return notes
