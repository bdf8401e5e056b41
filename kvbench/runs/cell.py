"""One cell: what it is, how far it has come, and the body of its record whatever happens."""

from __future__ import annotations

import contextlib
import time
import traceback
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from kvbench.errors import ConfigError, DataError, ModelSupportError, NonFiniteError, ran_out_of_memory
from kvbench.results.record import BODY_SCHEMA, cell_key
from kvbench.runs.autopsy_settings import AutopsySettings
from kvbench.runs.dataset_fit import skipped_measurement, skipped_names

if TYPE_CHECKING:
    from kvbench.cache import Policy
    from kvbench.datasets.base import Dataset
    from kvbench.models.spec import ModelSpec
    from kvbench.runs.context import BeyondContext, ContextUse
    from kvbench.runs.loop import CacheSetting
    from kvbench.runs.task import Task, TaskResult

_STATUS_OF: tuple[tuple[type[BaseException], str], ...] = (
    (NonFiniteError, "nonfinite"),
    (DataError, "data_error"),
    (ConfigError, "config_error"),
    (ModelSupportError, "incompatible"),
)
SHARED_SETTINGS = ("model", "dataset", "query_visible", "batch_size", "device", "versions", "cache_semantics")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Everything one record is about. `settings` decides the key; labels are for people, as is the autopsy."""

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
    beyond_context: BeyondContext = "refuse"
    autopsy: AutopsySettings = field(default_factory=AutopsySettings)

    @cached_property
    def key(self) -> str:
        """64 hex digits; the same settings give the same key everywhere."""
        return cell_key(self.settings)

    @property
    def shared_settings(self) -> dict[str, Any]:
        """What cells must agree in to share a model, its prompts and the full cache's answers."""
        return {name: self.settings[name] for name in SHARED_SETTINGS}

    @property
    def name(self) -> str:
        """Policy and budget, as progress bars and messages call the cell."""
        return f"{self.labels['policy']} at {self.labels['budget']}"


@dataclass(kw_only=True)
class Attempt:
    """One try at a cell; `phase` is what runs or ran last, None when everything is done."""

    cell: Cell
    sweep: str
    phase: str | None = "load"
    status: str = "ok"
    error: dict[str, str] | None = None
    duration_s: float = 0.0
    context: ContextUse | None = None
    started: datetime = field(default_factory=lambda: datetime.now(UTC))

    @property
    def failed(self) -> bool:
        """Whether something went wrong; then nothing more is tried."""
        return self.status != "ok"

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Run a block as `phase`: its time is the cell's, and whatever it raises is the cell's failure.

        `sys.exit` in a policy is one more exception here: it must not end the other cells.
        """
        self.phase, start_s = phase, time.monotonic()
        try:
            yield
        except BaseException as exception:
            self.fail(exception)
        finally:
            self.duration_s += time.monotonic() - start_s

    def fail(self, exception: BaseException) -> None:
        """Note what ended the attempt."""
        self.status, self.error = status_of(exception), described(exception)

    def body(self, environment: Mapping[str, Any], result: TaskResult | None = None) -> dict[str, Any]:
        """Return the body of the record."""
        return {
            "schema": BODY_SCHEMA,
            "key": self.cell.key,
            "sweep": self.sweep,
            "attempt": uuid.uuid4().hex,
            "labels": dict(self.cell.labels),
            "cell": dict(self.cell.settings),
            "status": "noisy" if self.status == "ok" and result is not None and result.is_noisy else self.status,
            "phase": self.phase if self.failed else None,
            "error": self.error,
            "started_utc": self.started.isoformat(timespec="milliseconds"),
            "duration_s": self.duration_s,
            "environment": dict(environment),
            "measurements": {} if result is None else result.measurements | self._counts(),
            "samples": [] if result is None else _sample_rows(self.cell, result),
            "curves": {} if result is None else result.curves,
            "skipped_items": skipped_names(self.cell.dataset),
            "prompts": None if self.context is None else self.context.as_record(),
        }

    def _counts(self) -> dict[str, dict[str, Any]]:
        """Items that were left out, and prompts that were measured although they are too long."""
        return skipped_measurement(self.cell.dataset) | ({} if self.context is None else self.context.measurement())


def _sample_rows(cell: Cell, result: TaskResult) -> list[dict[str, Any]]:
    """Rows with their id and cluster; without rows the data set is left alone, as it may be what failed."""
    clusters = {example.id: example.cluster for example in cell.dataset.examples()} if result.samples else {}
    return [{"id": name, "cluster": clusters[name], **row} for name, row in result.samples.items()]


def status_of(exception: BaseException) -> str:
    """Return the status that an exception gives a cell."""
    if ran_out_of_memory(exception):
        return "oom"
    return next((status for kind, status in _STATUS_OF if isinstance(exception, kind)), "crash")


def described(exception: BaseException) -> dict[str, str]:
    """Return type, message and traceback as a record holds them."""
    trace = "".join(traceback.format_exception(exception))
    texts = {"type": type(exception).__name__, "message": str(exception), "traceback": trace}
    # A record is UTF-8, which half a surrogate pair in a message is not.
    return {name: text.encode(errors="replace").decode() for name, text in texts.items()}
