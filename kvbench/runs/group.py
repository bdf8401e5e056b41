"""A group of cells that share model and data set, run in this process.

Tasks that are measured in batches run batch by batch: one prefill, then every cell of the group, so
that only one prompt is ever held and each cell pays for its decoding only. So cells come forward together: every
batch is kept at once, and a cell that measures nothing else is told of as soon as its last batch is done. Tasks of
time and memory run after that, cell by cell, with nothing shared left alive. Once a cell's record is told, a few of
its samples are looked at once more for its autopsy. What one cell does wrong is its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from kvbench.models.inputs import given_prompts
from kvbench.models.loader import LoadedModel, load_model
from kvbench.models.spec import ModelSpec
from kvbench.runs.autopsy import Autopsies
from kvbench.runs.cell import Cell
from kvbench.runs.cell_run import CellRun
from kvbench.runs.dataset_fit import rejected_items
from kvbench.runs.free_memory import free_memory
from kvbench.runs.group_plan import GroupPlan, Watcher
from kvbench.runs.prompts import Prompts


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
