"""One cell: load, run its tasks, and make a record whatever happens."""

from __future__ import annotations

import time
import traceback
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from kvbench.cache import Policy
from kvbench.datasets.base import Dataset
from kvbench.errors import ConfigError, DataError, ModelSupportError, NonFiniteError
from kvbench.models.loader import LoadedModel, load_model
from kvbench.models.spec import ModelSpec
from kvbench.records import cell_key
from kvbench.runs.dataset_fit import skipped_measurement, skipped_names
from kvbench.runs.environment import environment
from kvbench.runs.full_answers import FullAnswers
from kvbench.runs.loop import CacheSetting
from kvbench.runs.task import Bench, Task, TaskResult

_STATUS_OF: tuple[tuple[type[BaseException], str], ...] = (
    (torch.OutOfMemoryError, "oom"),
    (MemoryError, "oom"),
    (NonFiniteError, "nonfinite"),
    (DataError, "data_error"),
    (ConfigError, "config_error"),
    (ModelSupportError, "incompatible"),
)
_CPU_OUT_OF_MEMORY = "DefaultCPUAllocator: can't allocate memory"  # torch has no class for it
_SHARED_SETTINGS = ("model", "dataset", "batch_size", "device", "versions")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Everything one record is about. `settings` decides the key; labels are for people."""

    settings: Mapping[str, Any]
    labels: Mapping[str, Any]
    model: ModelSpec
    dataset: Dataset
    setting: CacheSetting
    full_policy: Policy
    tasks: Mapping[str, Task]
    batch_size: int
    seed: int
    device: str
    query_visible: bool = True

    @property
    def key(self) -> str:
        """64 hex digits; the same settings give the same key everywhere."""
        return cell_key(self.settings)


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


def run_cell(
    cell: Cell, *, shelf: ModelShelf, results: Path, sweep: str, advance: Callable[[float], None]
) -> dict[str, Any]:
    """Run all tasks of `cell` and return the body of its record; an error becomes its status."""
    started, start_s = datetime.now(UTC), time.monotonic()
    result, status, error = TaskResult(), "ok", None
    phase: str | None = "load"
    try:
        torch.manual_seed(cell.seed)
        bench = _bench(cell, shelf.get(cell.model, cell.device), results, advance)
        for name, task in cell.tasks.items():
            phase = name
            result.add(task.run(bench))
        result.measurements |= skipped_measurement(cell.dataset)
        phase = None
    except Exception as exception:
        status, error = _status(exception), _described(exception)
    return {
        "schema": 1,
        "key": cell.key,
        "sweep": sweep,
        "attempt": uuid.uuid4().hex,
        "labels": dict(cell.labels),
        "cell": dict(cell.settings),
        "status": status,
        "phase": phase,
        "error": error,
        "started_utc": started.isoformat(timespec="milliseconds"),
        "duration_s": time.monotonic() - start_s,
        "environment": environment(cell.device),
        "measurements": result.measurements,
        "samples": _sample_rows(cell, result),
        "curves": result.curves,
        "skipped_items": skipped_names(cell.dataset),
    }


def _bench(cell: Cell, loaded: LoadedModel, results: Path, advance: Callable[[float], None]) -> Bench:
    shared = {name: cell.settings[name] for name in _SHARED_SETTINGS} | {"query_visible": cell.query_visible}
    return Bench(
        loaded=loaded,
        dataset=cell.dataset,
        examples=cell.dataset.examples(),
        setting=cell.setting,
        full_policy=cell.full_policy,
        answers=FullAnswers(folder=results / "full_answers", settings=shared),
        batch_size=cell.batch_size,
        advance=advance,
        query_visible=cell.query_visible,
    )


def _sample_rows(cell: Cell, result: TaskResult) -> list[dict[str, Any]]:
    """Rows with their id and cluster; without rows the data set is left alone, as it may be what failed."""
    clusters = {example.id: example.cluster for example in cell.dataset.examples()} if result.samples else {}
    return [{"id": name, "cluster": clusters[name], **row} for name, row in result.samples.items()]


def _status(exception: BaseException) -> str:
    if isinstance(exception, RuntimeError) and _CPU_OUT_OF_MEMORY in str(exception):
        return "oom"
    return next((status for kind, status in _STATUS_OF if isinstance(exception, kind)), "crash")


def _described(exception: BaseException) -> dict[str, str]:
    trace = "".join(traceback.format_exception(exception))
    texts = {"type": type(exception).__name__, "message": str(exception), "traceback": trace}
    # A record is UTF-8, which half a surrogate pair in a message is not.
    return {name: text.encode(errors="replace").decode() for name, text in texts.items()}
