"""Run a group of cells that share a model and a data set, in this process.

Tasks that are measured in batches come first, batch by batch: one prefill, then every cell of the group, so that only
one prompt is ever held and each cell pays for its decoding only. Every batch is kept at once, and a cell that measures
nothing else is told of as soon as its last batch is done. Tasks of time and memory follow, cell by cell, with nothing
shared left alive. Once a cell's record is told, a few of its samples are looked at once more for its autopsy. What one
cell does wrong is its own.

Where `batch_size` is `auto`, as many prompts are decoded together as surely fit, and no more than pay. Numbers do not
depend on it but for rounding, so a key says `auto` and a record how many it was. What a prompt takes is estimated from
the model's config and from what the cells do with it: the recorded prompt that they share, the caches that are alive at
once, statistics, activations and logits. A power of two is taken, so that a little more or less memory changes nothing,
and the prompts are spread evenly, so that few batches are of another shape than the rest.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from kvbench.autopsy.replay import Autopsies
from kvbench.cache import Needs, Policy, When
from kvbench.cache.policy import needs_of, steps_between_cuts
from kvbench.errors import KvbenchError
from kvbench.models.devices import free_bytes as of_the_device
from kvbench.models.inputs import GivenPrompts, given_prompts
from kvbench.models.loader import LoadedModel, load_model
from kvbench.models.spec import ModelSpec
from kvbench.results.record import encode_record
from kvbench.sweep.cell import Attempt, Cell, WithoutItems, context_use, rejected_items
from kvbench.tasks.memory import free_memory
from kvbench.tasks.task import BatchTask, Bench, FullAnswers, Payload, Prompts, TaskResult, is_timed

_USED_FRACTION = 0.5  # of the free memory: captured steps may keep a quarter, and a vision tower is not in the estimate
_FIXED_BYTES = 2**30  # chunks of logits, blocks of attention, kept logits of the full cache
_MOST_ON_CPU = 32  # from here on a step takes nearly twice the time for twice the prompts
_MOST_ON_GPU = 64  # rows that the kernels of a decode step are made for (kernels.dispatch.MAX_ROWS)
_LARGER = 2  # times as many where every answer goes through the model in chunks, whose kernels know no largest batch


def auto_batch_size(
    loaded: LoadedModel, cells: Sequence[Cell], prompt_tokens: Collection[int], *, free_bytes: int | None = None
) -> int:
    """Return the batch size of `cells`, which share their prompts of so many tokens each.

    free_bytes: memory for all of it, that of the devices if not given.
    """
    if free_bytes is None:  # layers are shared out evenly: the fullest device is the limit
        free_bytes = len(loaded.devices) * min(map(of_the_device, loaded.devices))
    room = (free_bytes * _USED_FRACTION - _FIXED_BYTES) / _prompt_bytes(loaded, cells, max(prompt_tokens, default=1))
    most = _MOST_ON_CPU if loaded.device.type == "cpu" else _MOST_ON_GPU
    if not any(_steps(cell) for cell in cells):
        most *= _LARGER
    size = 1
    while 2 * size <= min(room, most):
        size *= 2
    num_batches = max(1, -(-len(prompt_tokens) // size))
    return max(1, -(-len(prompt_tokens) // num_batches))


def _steps(cell: Cell) -> bool:
    """Whether the quality passes of a cell feed single tokens; otherwise every answer is known and goes in chunks."""
    evicts = steps_between_cuts(cell.setting.policy) is not None
    return any(isinstance(task, BatchTask) and (evicts or task.generates) for task in cell.tasks.values())


def _prompt_bytes(loaded: LoadedModel, cells: Sequence[Cell], prompt: int) -> int:
    """Return what one prompt of `prompt` tokens takes at most, over all layers."""
    config = loaded.model.config.get_text_config()
    layers, width = config.num_hidden_layers, config.hidden_size
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head = getattr(config, "head_dim", None) or width // config.num_attention_heads
    number_bytes = loaded.model.dtype.itemsize
    entry_bytes = 2 * layers * heads * head * number_bytes
    whole = prompt + max((_new_tokens(cell) for cell in cells), default=0)
    held = [_most_entries(cell, prompt, whole) for cell in cells]
    caches = whole + max(held, default=0)  # the full cache's, to compare with; captured steps keep theirs elsewhere
    activations = prompt * (6 * width + 3 * getattr(config, "intermediate_size", 4 * width)) * number_bytes
    statistics = 4 * prompt * layers * heads * _recorded_rows(cell.setting.policy for cell in cells)
    heard = any(Needs.HIDDEN in needs_of(cell.setting.policy) for cell in cells)
    hidden = prompt * layers * width * number_bytes * heard
    logits = 4 * 4 * config.vocab_size
    return int((prompt + caches) * entry_bytes + activations + statistics + hidden + logits)


def _most_entries(cell: Cell, prompt: int, whole: int) -> int:
    policy, budget = cell.setting.policy, cell.setting.budget
    if not policy.bounded:
        return whole
    entries = min(whole, budget.entries(seen_tokens=whole, prompt_tokens=prompt) + 1)
    if When.PREFILL not in policy.when:
        return max(entries, prompt)
    return entries if When.DECODE in policy.when else min(whole, entries + whole - prompt)


def _recorded_rows(policies: Iterable[Policy]) -> int:
    """Return how many rows of attention over the prompt are recorded for all of them, per layer and head."""
    rows: set[tuple[Needs, int, str, bool]] = set()
    for policy in policies:
        needs, counts = needs_of(policy), {Needs.WINDOW: policy.window_tokens, Needs.PROBS: 1, Needs.MASS: 1}
        for need in needs:
            rows.add((need, counts.get(need, policy.window_tokens), policy.reduction, Needs.MASS in needs))
    return sum(count for _, count, _, _ in rows)


def _new_tokens(cell: Cell) -> int:
    asked: list[Any] = [getattr(task, "max_new_tokens", 0) for task in cell.tasks.values()]
    for example in cell.dataset.examples():
        asked.append(
            example.window.scored_tokens if example.window else len(example.reference.encode(errors="replace"))
        )
    return int(max(asked, default=0))


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
    """How groups run: where results go, whether prompts are shared, where batches are kept.

    num_workers: how many groups run at once on this machine; what is timed then is timed while the others wait.
    """

    results: Path
    sweep: str
    share_prompts: bool
    batches_of: Callable[[str], Batches]
    num_workers: int = 1


_IDS = "@ids"  # in a payload, beside the names of tasks
_log = logging.getLogger(__name__)


class CellRun:
    """One cell of a running group: its batches, its other tasks, and its record whatever happens.

    is_told: whether the watcher has the record; then nothing more happens.
    """

    def __init__(self, cell: Cell, plan: GroupPlan, watcher: Watcher) -> None:
        self.attempt = Attempt(cell=cell, sweep=plan.sweep)
        self.is_told = False
        self._plan = plan
        self._watcher = watcher
        self._kept = plan.batches_of(cell.key)
        self._payloads: dict[int, Payload] = {}
        self._bench: Bench | None = None
        self._batched = {name: task for name, task in cell.tasks.items() if isinstance(task, BatchTask)}

    def during(self, phase: str, *, timed: bool = False) -> Any:
        """Tell the watcher, and make what is raised the cell's own failure; timed: wait until nothing works beside."""
        self._watcher.active(self.attempt.cell.key, phase, timed=timed)
        return self.attempt.during(phase)

    def begin(
        self,
        loaded: LoadedModel,
        prompts: Prompts,
        given: GivenPrompts,
        rejected: Mapping[str, str],
        *,
        batch_size: int,
    ) -> None:
        """Look whether the prompts fit into the context, set the bench, and take up what was committed before.

        rejected: reasons by the ids of items that the processor does not take, which the record names as skipped. The
        prompts' digest is part of what the full cache's answers are stored by: to other prompts there are others.
        """
        cell, self.attempt.batch_size = self.attempt.cell, batch_size
        if rejected:
            cell = self.attempt.cell = replace(cell, dataset=WithoutItems(whole=cell.dataset, reasons=rejected))
        examples = cell.dataset.examples()
        with self.during("load"):
            self.attempt.context = context_use(loaded, examples, given, cell.setting, cell.tasks)
            if cell.beyond_context == "refuse":
                self.attempt.context.check()
        stored_by = {**cell.shared_settings, "prompts": given.digest, "batch_size": batch_size}
        self._bench = Bench(
            loaded=loaded,
            dataset=cell.dataset,
            examples=examples,
            setting=cell.setting,
            full_policy=cell.full_policy,
            answers=FullAnswers(folder=self._plan.results / "full_answers", settings=stored_by),
            batch_size=batch_size,
            advance=lambda tasks: self._watcher.advance(cell.key, tasks),
            shared_prompts=prompts,
            query_visible=cell.query_visible,
        )
        if self._batched:
            kept = self._kept.batches().items()
            self._payloads = {n: p for n, p in kept if n < len(prompts) and self._is_of(n, p, prompts)}
            if self._payloads:
                self._tell_batches(len(self._payloads))
            else:
                self._watcher.batches(cell.key, 0, len(prompts))

    def _is_of(self, number: int, payload: Payload, prompts: Prompts) -> bool:
        """Whether a kept payload is that of the batch `number` as it is planned now."""
        told = self._told_of(number, prompts)
        return set(payload) == {*told, *self._batched} and all(payload[name] == told[name] for name in told)

    def _told_of(self, number: int, prompts: Prompts) -> Payload:
        """Return what a payload says of its batch: the examples, where another try may choose another size."""
        return {} if self.attempt.cell.batch_size is not None else {_IDS: prompts.ids_of(number)}

    def _tell_batches(self, num_new: int) -> None:
        assert self._bench is not None
        key, total = self.attempt.cell.key, len(self._bench.prompts)
        self._watcher.advance(key, len(self._batched) * num_new / total)
        self._watcher.batches(key, len(self._payloads), total)

    def measure_batch(self, number: int) -> None:
        """Run every batched task on one batch unless that was done, and keep what they gave; report what is whole."""
        if self.is_told or not self._batched or self._bench is None:
            return
        if number not in self._payloads and not self.attempt.failed:
            payload = self._told_of(number, self._bench.prompts)
            for name, task in self._batched.items():
                if not self.attempt.failed:
                    with self.during(name):
                        torch.manual_seed(self.attempt.cell.seed + number)
                        payload[name] = task.measure(self._bench, self._bench.prompts.part(number))
            if not self.attempt.failed:
                self._commit(number, payload)
                self._tell_batches(1)
        if self.attempt.failed:
            self.finish()
            free_memory()
        elif len(self._batched) == len(self.attempt.cell.tasks) and len(self._payloads) == len(self._bench.prompts):
            self.finish()

    def _commit(self, number: int, payload: Payload) -> None:
        self._payloads[number] = payload
        try:
            self._kept.commit(number, payload)
        except KvbenchError as error:  # it only costs time after a kill; the record itself says more
            _log.warning("%s", error)

    def finish(self) -> None:
        """Sum up the batches, run the other tasks in order, and tell the watcher of the record."""
        result = TaskResult()
        for name, task in self.attempt.cell.tasks.items():
            if self.attempt.failed or self._bench is None:
                break
            with self.during(name, timed=is_timed(task)):
                result.add(self._task_result(name, task, self._bench))
        self.is_told = True
        self._watcher.done(self._record(result))

    def _task_result(self, name: str, task: Any, bench: Bench) -> TaskResult:
        found: TaskResult
        if name in self._batched:
            found = task.summarise(bench, [self._payloads[number][name] for number in sorted(self._payloads)])
        else:
            torch.manual_seed(self.attempt.cell.seed)
            found = task.run(bench)
        return found

    def _record(self, result: TaskResult) -> dict[str, Any]:
        """Return the body of the record; what no record can hold is one more failure of the cell."""
        known = self.attempt.cell.environment()
        if self._plan.num_workers > 1:
            known = {**known, "num_workers": self._plan.num_workers}
        try:
            body = self.attempt.body(known, result)
            encode_record(body)
        except BaseException as error:  # a task may give anything
            self.attempt.phase = "report"
            self.attempt.fail(error)
            return self.attempt.body(known)
        return body


class ModelShelf:
    """The model used last, so that cells that share one load it once."""

    def __init__(self) -> None:
        self._last: tuple[tuple[ModelSpec, str], LoadedModel] | None = None

    def get(self, spec: ModelSpec, device: str) -> LoadedModel:
        """Return the model of `spec` on `device`; another one is let go first."""
        if self._last is None or self._last[0] != (spec, device):
            if self._last is not None:
                self._last = None
                free_memory()
            self._last = ((spec, device), load_model(spec, device))
        return self._last[1]


def run_group(cells: Sequence[Cell], plan: GroupPlan, *, shelf: ModelShelf, watcher: Watcher) -> None:
    """Run `cells`, which agree in `shared_settings`; each ends with one `watcher.done`.

    Cells are left over where nothing works in this process any more: they need a fresh one.
    """
    in_batches = all(isinstance(task, BatchTask) for cell in cells for task in cell.tasks.values())
    share = [cell.setting.policy for cell in cells] if plan.share_prompts and in_batches else []
    autopsies = Autopsies(plan.results, watcher, share=share)
    for number, some in enumerate([cells] if plan.share_prompts else [[cell] for cell in cells]):
        if number:
            free_memory()  # of the cell before; at the end the process goes, which is faster
        runs = [CellRun(cell, plan, watcher) for cell in some]
        loaded, prompts = _load(runs, plan, shelf, watcher)
        for batch in range(len(prompts) if prompts else 0):
            for run in runs:
                run.measure_batch(batch)
        if prompts is not None:
            prompts.forget()
        for run in runs:
            if not run.is_told:
                free_memory()  # of the prompts, and of what was looked at last
                run.finish()
            if loaded is not None and not run.attempt.failed and not autopsies.take(run.attempt.cell, loaded):
                return


def _load(
    runs: Sequence[CellRun], plan: GroupPlan, shelf: ModelShelf, watcher: Watcher
) -> tuple[LoadedModel, Prompts] | tuple[None, None]:
    """Load the model and the examples for all; a failure is the failure of each, told once per cell."""
    first, cell = runs[0], runs[0].attempt.cell
    with first.during("load"):
        loaded = dataclasses.replace(shelf.get(cell.model, cell.device), beat=watcher.beat)
        policies = [run.attempt.cell.setting.policy for run in runs] + [cell.full_policy]
        rejected = rejected_items(loaded, cell.dataset, watcher.beat)
        examples = [example for example in cell.dataset.examples() if example.id not in rejected]
        given = given_prompts(loaded, examples)
        size = cell.batch_size or auto_batch_size(loaded, [run.attempt.cell for run in runs], given.num_tokens.values())
        prompts = Prompts(
            loaded,
            examples,
            size,
            share=policies if plan.share_prompts else None,
            query_visible=cell.query_visible,
        )
        for run in runs:
            run.begin(loaded, prompts, given, rejected, batch_size=size)
        return loaded, prompts
    for run in runs[1:]:
        run.attempt.status, run.attempt.error = first.attempt.status, first.attempt.error
    return None, None
