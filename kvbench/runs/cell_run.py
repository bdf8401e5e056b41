"""One cell of a running group: its batches, its other tasks, and its record whatever happens."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from kvbench.errors import KvbenchError
from kvbench.models.inputs import GivenPrompts
from kvbench.models.loader import LoadedModel
from kvbench.runs.batch_task import BatchTask, Payload
from kvbench.runs.cell import Attempt, Cell
from kvbench.runs.context import context_use
from kvbench.runs.dataset_fit import WithoutItems
from kvbench.runs.environment import environment
from kvbench.runs.free_memory import free_memory
from kvbench.runs.full_answers import FullAnswers
from kvbench.runs.group_plan import GroupPlan, Watcher
from kvbench.runs.prompts import Prompts
from kvbench.runs.task import Bench, TaskResult, is_timed

_log = logging.getLogger(__name__)


class CellRun:
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

    def during(self, phase: str, *, timed: bool = False) -> Any:
        """Tell the watcher, and make what is raised the cell's own failure; timed: wait until nothing works beside."""
        self._watcher.active(self.attempt.cell.key, phase, timed=timed)
        return self.attempt.during(phase)

    def leave_out(self, rejected: Mapping[str, str]) -> None:
        """Go on without the items of these ids, which the record names as skipped for these reasons."""
        if rejected:
            cell = self.attempt.cell
            self.attempt.cell = replace(cell, dataset=WithoutItems(whole=cell.dataset, reasons=rejected))

    def begin(self, loaded: LoadedModel, prompts: Prompts, given: GivenPrompts) -> None:
        """Look whether the prompts fit into the context, set the bench, and take up what was committed before.

        The prompts' digest is part of what the full cache's answers are stored by: to other prompts there are others.
        """
        cell = self.attempt.cell
        with self.during("load"):
            self.attempt.context = context_use(loaded, cell.dataset.examples(), given, cell.setting, cell.tasks)
            if cell.beyond_context == "refuse":
                self.attempt.context.check()
        stored_by = {**cell.shared_settings, "prompts": given.digest}
        self._bench = Bench(
            loaded=loaded,
            dataset=cell.dataset,
            examples=cell.dataset.examples(),
            setting=cell.setting,
            full_policy=cell.full_policy,
            answers=FullAnswers(folder=self._plan.results / "full_answers", settings=stored_by),
            batch_size=cell.batch_size,
            advance=lambda tasks: self._watcher.advance(cell.key, tasks),
            shared_prompts=prompts,
            query_visible=cell.query_visible,
        )
        if self._batched:
            kept = self._kept.batches().items()
            self._payloads = {n: p for n, p in kept if n < len(prompts) and set(p) == set(self._batched)}
            if self._payloads:
                self._watcher.advance(cell.key, len(self._batched) * len(self._payloads) / len(prompts))
            self._watcher.batches(cell.key, len(self._payloads), len(prompts))

    def measure_batch(self, number: int) -> None:
        """Run every batched task on one batch unless that was done, and commit what they gave."""
        if self.attempt.failed or not self._batched or self._bench is None or number in self._payloads:
            return
        payload: Payload = {}
        for name, task in self._batched.items():
            self._measure(name, task, number, payload)
        self._commit(number, payload)
        if self.attempt.failed:
            self._report()
            free_memory()
        else:
            key, total = self.attempt.cell.key, len(self._bench.prompts)
            self._watcher.advance(key, len(self._batched) / total)
            self._watcher.batches(key, len(self._payloads), total)

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

    @property
    def is_measured(self) -> bool:
        """Whether nothing is left but to sum up and report."""
        if self._bench is None or len(self._batched) < len(self.attempt.cell.tasks):
            return False
        return len(self._payloads) == len(self._bench.prompts)

    def finish(self) -> None:
        """Sum up the batches, run the other tasks in order, and report; nothing if that was done."""
        if self._reported:
            return
        for name, task in self.attempt.cell.tasks.items():
            if self.attempt.failed or self._bench is None:
                break
            with self.during(name, timed=is_timed(task)):
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
