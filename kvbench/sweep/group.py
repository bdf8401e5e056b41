"""A group of cells that share model and data set, run in this process.

Tasks that are measured in batches run batch by batch: one prefill, then every cell of the group, so
that only one prompt is ever held and each cell pays for its decoding only. So cells come forward together: every
batch is kept at once, and a cell that measures nothing else is told of as soon as its last batch is done. Tasks of
time and memory run after that, cell by cell, with nothing shared left alive. Once a cell's record is told, a few of
its samples are looked at once more for its autopsy. What one cell does wrong is its own.

What a running group of cells is given: who watches it, where batches are kept, where results go.

One cell of a running group: its batches, its other tasks, and its record whatever happens.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from kvbench.autopsy.body import Autopsies
from kvbench.errors import KvbenchError
from kvbench.models.inputs import GivenPrompts, given_prompts
from kvbench.models.loader import LoadedModel, load_model
from kvbench.models.spec import ModelSpec
from kvbench.sweep.cell import Attempt, Cell, WithoutItems, context_use, environment, rejected_items
from kvbench.tasks.memory import free_memory
from kvbench.tasks.prompts import Prompts
from kvbench.tasks.task import BatchTask, Bench, FullAnswers, Payload, TaskResult, is_timed


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


class ModelShelf:
    """The model used last, so that cells that share one load it once."""

    def __init__(self) -> None:
        self._last: tuple[tuple[ModelSpec, str], LoadedModel] | None = None

    def get(self, spec: ModelSpec, device: str) -> LoadedModel:
        """Return the model of `spec` on `device`; another one is let go first."""
        if self._last is None or self._last[0] != (spec, device):
            self._last = None
            free_memory()
            self._last = ((spec, device), load_model(spec, device))
        return self._last[1]


def run_group(cells: Sequence[Cell], plan: GroupPlan, *, shelf: ModelShelf, watcher: Watcher) -> None:
    """Run `cells`, which agree in `shared_settings`; each ends with one `watcher.done`.

    Cells are left over where nothing works in this process any more: they need a fresh one.
    """
    autopsies = Autopsies(plan.results, watcher)
    together = [cells] if plan.share_prompts else [[cell] for cell in cells]
    for some in together:
        runs = [CellRun(cell, plan, watcher) for cell in some]
        loaded, prompts = _load(runs, plan, shelf, watcher)
        for number in range(len(prompts) if prompts else 0):
            for run in runs:
                run.measure_batch(number)
                if run.is_measured:
                    run.finish()
        if prompts is not None:
            prompts.forget()
        free_memory()
        for run in runs:
            run.finish()
            if loaded is not None and not run.attempt.failed and not autopsies.take(run.attempt.cell, loaded):
                return


def _load(
    runs: Sequence[CellRun], plan: GroupPlan, shelf: ModelShelf, watcher: Watcher
) -> tuple[LoadedModel, Prompts] | tuple[None, None]:
    """Load the model and the examples for all; a failure is the failure of each, told once per cell."""
    first = runs[0]
    with first.during("load"):
        cell = first.attempt.cell
        loaded = dataclasses.replace(shelf.get(cell.model, cell.device), beat=watcher.beat)
        policies = [run.attempt.cell.setting.policy for run in runs] + [cell.full_policy]
        shared = policies if plan.share_prompts else None
        rejected = rejected_items(loaded, cell.dataset, watcher.beat)
        for run in runs:
            run.leave_out(rejected)
        examples = first.attempt.cell.dataset.examples()
        prompts = Prompts(loaded, examples, cell.batch_size, share=shared, query_visible=cell.query_visible)
        given = given_prompts(loaded, examples)
        for run in runs:
            run.begin(loaded, prompts, given)
        return loaded, prompts
    for run in runs[1:]:
        run.attempt.status, run.attempt.error = first.attempt.status, first.attempt.error
    return None, None
