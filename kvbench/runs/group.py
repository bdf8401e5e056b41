"""A group of cells that share model and data set, run in this process.

Tasks that are measured in batches run batch by batch: one prefill, then every cell of the group, so
that only one prompt is ever held and each cell pays for its decoding only. Tasks of time and memory
run after that, cell by cell, with nothing shared left alive. What one cell does wrong is its own.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from kvbench.errors import KvbenchError
from kvbench.models.loader import LoadedModel, load_model
from kvbench.models.spec import ModelSpec
from kvbench.runs.batch_task import BatchTask, Payload
from kvbench.runs.cell import Attempt, Cell
from kvbench.runs.environment import environment
from kvbench.runs.full_answers import FullAnswers
from kvbench.runs.prompts import Prompts
from kvbench.runs.task import Bench, TaskResult

_log = logging.getLogger(__name__)


class Watcher(Protocol):
    """Is told what a group does; every call means that work goes on."""

    def active(self, key: str, phase: str) -> None:
        """From now on the time, and any sudden death, belong to the phase `phase` of the cell `key`."""

    def advance(self, key: str, tasks: float) -> None:
        """Note that the cell came further by a share of a task."""

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


class ModelShelf:
    """The model used last, so that cells that share one load it once."""

    def __init__(self) -> None:
        self._last: tuple[tuple[ModelSpec, str], LoadedModel] | None = None

    def get(self, spec: ModelSpec, device: str) -> LoadedModel:
        """Return the model of `spec` on `device`; another one is let go first."""
        if self._last is None or self._last[0] != (spec, device):
            self._last = None
            self._last = ((spec, device), load_model(spec, device))
        return self._last[1]


@dataclass(frozen=True, kw_only=True)
class GroupPlan:
    """How groups run: where results go, whether prompts are shared, where batches are kept."""

    results: Path
    sweep: str
    share_prompts: bool
    batches_of: Callable[[str], Batches]


def run_group(cells: Sequence[Cell], plan: GroupPlan, *, shelf: ModelShelf, watcher: Watcher) -> None:
    """Run `cells`, which agree in `shared_settings`; each ends with one `watcher.done`."""
    together = [cells] if plan.share_prompts else [[cell] for cell in cells]
    for some in together:
        runs = [_CellRun(cell, plan, watcher) for cell in some]
        prompts = _load(runs, plan, shelf)
        for number in range(len(prompts) if prompts else 0):
            for run in runs:
                run.measure_batch(number)
        if prompts is not None:
            prompts.forget()
        _free_memory()
        for run in runs:
            run.finish()


def _load(runs: Sequence[_CellRun], plan: GroupPlan, shelf: ModelShelf) -> Prompts | None:
    """Load the model and the examples for all; a failure is the failure of each, told once per cell."""
    first = runs[0]
    with first.during("load"):
        cell = first.attempt.cell
        loaded = shelf.get(cell.model, cell.device)
        policies = [run.attempt.cell.setting.policy for run in runs] + [cell.full_policy]
        shared = policies if plan.share_prompts else None
        prompts = Prompts(loaded, cell.dataset.examples(), cell.batch_size, share=shared)
        for run in runs:
            run.begin(loaded, prompts)
        return prompts
    for run in runs[1:]:
        run.attempt.status, run.attempt.error = first.attempt.status, first.attempt.error
    return None


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


class _CellRun:
    """One cell of a running group."""

    def __init__(self, cell: Cell, plan: GroupPlan, watcher: Watcher) -> None:
        self.attempt = Attempt(cell=cell, sweep=plan.sweep)
        self._plan = plan
        self._watcher = watcher
        self._result = TaskResult()
        self._kept = plan.batches_of(cell.key)
        self._payloads: dict[int, Payload] = {}
        self._bench: Bench | None = None
        self._batched = {name: task for name, task in cell.tasks.items() if isinstance(task, BatchTask)}
        self._reported = False

    def during(self, phase: str) -> Any:
        """Tell the watcher, and make what is raised the cell's own failure."""
        self._watcher.active(self.attempt.cell.key, phase)
        return self.attempt.during(phase)

    def begin(self, loaded: LoadedModel, prompts: Prompts) -> None:
        """Set the bench, and take up what was committed before."""
        cell = self.attempt.cell
        self._bench = Bench(
            loaded=loaded,
            dataset=cell.dataset,
            examples=cell.dataset.examples(),
            setting=cell.setting,
            full_policy=cell.full_policy,
            answers=FullAnswers(folder=self._plan.results / "full_answers", settings=cell.shared_settings),
            batch_size=cell.batch_size,
            advance=lambda tasks: self._watcher.advance(cell.key, tasks),
            shared_prompts=prompts,
            beat=self._watcher.beat,
        )
        if self._batched:
            self._payloads = {n: p for n, p in self._kept.batches().items() if set(p) == set(self._batched)}

    def measure_batch(self, number: int) -> None:
        """Run every batched task on one batch, and commit what they gave."""
        if self.attempt.failed or not self._batched or self._bench is None:
            return
        if number not in self._payloads:
            payload: Payload = {}
            for name, task in self._batched.items():
                self._measure(name, task, number, payload)
            self._commit(number, payload)
        if self.attempt.failed:
            self._report()
            _free_memory()
        else:
            self._watcher.advance(self.attempt.cell.key, len(self._batched) / len(self._bench.prompts))

    def _measure(self, name: str, task: BatchTask, number: int, payload: Payload) -> None:
        if self.attempt.failed or self._bench is None:
            return
        with self.during(name):
            torch.manual_seed(self.attempt.cell.seed + number)
            payload[name] = task.measure(self._bench, self._bench.prompts.part(number))

    def _commit(self, number: int, payload: Payload) -> None:
        if self.attempt.failed:
            return
        self._payloads[number] = payload
        try:
            self._kept.commit(number, payload)
        except KvbenchError as error:  # it only costs time after a kill; the record itself says more
            _log.warning("%s", error)

    def finish(self) -> None:
        """Sum up the batches, run the other tasks in order, and report."""
        for name, task in self.attempt.cell.tasks.items():
            if self.attempt.failed or self._bench is None:
                break
            with self.during(name):
                self._result.add(self._task_result(name, task))
        self._report()

    def _task_result(self, name: str, task: Any) -> TaskResult:
        assert self._bench is not None
        if name in self._batched:
            payloads = [self._payloads[number][name] for number in sorted(self._payloads)]
            summary: TaskResult = task.summarise(self._bench, payloads)
            return summary
        torch.manual_seed(self.attempt.cell.seed)
        alone: TaskResult = task.run(self._bench)
        return alone

    def _report(self) -> None:
        if self._reported:
            return
        self._reported = True
        body = self.attempt.body(environment(self.attempt.cell.device), self._result)
        self._watcher.done(body)
