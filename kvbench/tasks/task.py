"""What a task gets and gives back; a task never knows which policy it runs.

A cell hands each of its tasks a `Bench` and merges the `TaskResult`s into its record. A `BatchTask` is measured batch
by batch, so that cells share prompts and a kill costs one batch. `FullAnswers` are the full cache's own greedy answers,
the reference of `rougeL_vs_full` and of fidelity: files beside the records, so that every cell of a sweep, and the next
sweep, compares with the same texts.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol

from kvbench.cache import UNLIMITED, Policy
from kvbench.datasets.base import Dataset, Example
from kvbench.errors import ConfigError, MeasureError
from kvbench.measures import bounds_on_scale, score_scale
from kvbench.models.loader import LoadedModel
from kvbench.results.files import canonical_json, replace_file
from kvbench.results.record import cell_key
from kvbench.stats.intervals import Interval, mean_interval, pooled_ratio_interval
from kvbench.tasks.decode import CacheSetting
from kvbench.tasks.prompts import Part, Prompts

Answers = dict[str, list[int]]
_NONE: Mapping[str, str] = {}


@dataclass(frozen=True, kw_only=True)
class FullAnswers:
    """Answers under `folder` for one model and data set, described by `settings`."""

    folder: Path
    settings: Mapping[str, Any]

    def get(self, max_new_tokens: int, compute: Callable[[], Answers], needed: Mapping[str, str] = _NONE) -> Answers:
        """Return token ids by example id; `compute` runs when they are not stored or not readable.

        needed: names that must be among them, each with its example's id. Raises: MeasureError if one is not.
        """
        settings = {**self.settings, "max_new_tokens": max_new_tokens}
        path = self.folder / f"{cell_key(settings)[:16]}.json"
        stored = _read(path, settings)
        if stored is None:
            stored = compute()
            content = {"settings": settings, "answers": stored, "sha256": _digest(stored)}
            replace_file(path, canonical_json(content).encode())
        for name, example_id in needed.items():
            if name not in stored:
                raise MeasureError(
                    f"the stored full answers lack {example_id}; delete results/full_answers and run again"
                )
        return stored


def _read(path: Path, settings: Mapping[str, Any]) -> Answers | None:
    """Return None for a file that is torn, changed or of other settings: it is computed again."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        answers = dict(content["answers"])
        same = content["settings"] == json.loads(canonical_json(settings))
        return answers if same and content["sha256"] == _digest(answers) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _digest(answers: Answers) -> str:
    return hashlib.sha256(canonical_json(answers).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Everything a task may use. `advance(share)` moves the cell's progress bar, shares add up to 1.

    `full` is the full cache as a setting of its own; `answers` gives its greedy answers, computed once
    per model, data set and length. `shared_prompts`: those of the group of cells, None for a cell alone.
    query_visible: whether the question is part of what a policy sees when it compresses the prompt; if not,
    picture and context are compressed first and the question follows.
    """

    loaded: LoadedModel
    dataset: Dataset
    examples: Sequence[Example]
    setting: CacheSetting
    full_policy: Policy
    answers: FullAnswers
    batch_size: int
    advance: Callable[[float], None]
    shared_prompts: Prompts | None = None
    query_visible: bool = True

    def beat(self) -> None:
        """Tell a watchdog that work goes on; `Decoding` does at every pass of the model, so other loops have to."""
        self.loaded.beat()

    @property
    def full(self) -> CacheSetting:
        """The full cache at original positions: what everything is compared with."""
        return CacheSetting(policy=self.full_policy, budget=UNLIMITED, positions="original", engine=self.setting.engine)

    @cached_property
    def prompts(self) -> Prompts:
        """The planned batches."""
        return self.shared_prompts or self.own_prompts()

    def own_prompts(self) -> Prompts:
        """Return the planned batches anew, shared with nobody."""
        return Prompts(self.loaded, self.examples, self.batch_size, query_visible=self.query_visible)


@dataclass(kw_only=True)
class TaskResult:
    """Measurements by name, rows by example id, curves by name; as the record stores them.

    is_noisy: its times come from a machine that was not quiet, which gives the cell the status noisy.
    """

    measurements: dict[str, dict[str, Any]] = field(default_factory=dict)
    samples: dict[str, dict[str, Any]] = field(default_factory=dict)
    curves: dict[str, list[list[float]]] = field(default_factory=dict)
    is_noisy: bool = False

    def measure(self, name: str, interval: Interval, unit: str = "") -> None:
        """Add one measurement, its interval cut to what the measure can be."""
        if interval.value is not None and interval.low is not None and interval.high is not None:
            low, high = bounds_on_scale(name, interval.value, interval.low, interval.high)
            interval = replace(interval, low=low, high=high)
        self.measurements[name] = interval.as_measurement(unit)

    def note(self, name: str, value: float, unit: str = "", *, n: int = 1, method: str = "observed once") -> None:
        """Add a number that has no interval."""
        self.measurements[name] = {"value": value, "low": None, "high": None, "n": n, "unit": unit, "method": method}

    def measure_means(self, names: Iterable[str], bench: Bench, units: Mapping[str, str] = _NONE) -> None:
        """Add the mean over the examples that have it of each field of `samples`."""
        for name in names:
            found = [(self.samples[one.id].get(name), one.cluster) for one in bench.examples]
            scored = [(value, cluster) for value, cluster in found if value is not None]
            values, clusters = [value for value, _ in scored], [cluster for _, cluster in scored]
            interval = mean_interval(values, clusters, scale=score_scale(name))
            self.measure(name, interval, units.get(name, ""))

    def pooled(
        self,
        total: str,
        count: str,
        examples: Iterable[Example],
        transform: Callable[[float], float] | None = None,
        scale: tuple[float, float] | None = None,
    ) -> Interval:
        """Return the sum of one field of `samples` over that of another; `scale` is that of any sample's ratio."""
        rows = [(self.samples[one.id], one.cluster) for one in examples]
        sums, counts = [row[total] for row, _ in rows], [row[count] for row, _ in rows]
        return pooled_ratio_interval(sums, counts, [cluster for _, cluster in rows], transform, scale=scale)

    def add(self, other: TaskResult) -> None:
        """Merge another task's result; rows of one example become one row."""
        self.measurements |= other.measurements
        self.curves |= other.curves
        self.is_noisy |= other.is_noisy
        for example_id, row in other.samples.items():
            self.samples.setdefault(example_id, {}).update(row)


class Task(Protocol):
    """One measurement pass, a frozen dataclass whose fields are its settings.

    `protocol` names the definition of what it measures; a change of definition is a new name. A task
    that looks at no text, so that random weights and random prompts serve it, says `reads_text = False`.
    The class flags `needs_reference`, `needs_follow_ups` and `hides_question` (it honours query_visible=false)
    are checked against the data set before the model is loaded. A task whose numbers do not depend on what else
    runs on the machine says `is_timed = False`, and waits for nobody.
    """

    protocol: ClassVar[str]

    def run(self, bench: Bench) -> TaskResult:
        """Measure. Raises: MeasureError when a number contradicts itself."""


def check_least(name: str, task: object, **least: int) -> None:
    """Raise ConfigError unless each of these settings of the task called `name` is at least so much."""
    if any(getattr(task, setting) < number for setting, number in least.items()):
        values = ", ".join(f"{setting}={getattr(task, setting)}" for setting in least)
        allowed = ", ".join(f">= {number}" for number in least.values())
        raise ConfigError(f"task.{name} has {values}; allowed: {allowed}")


def is_timed(task: object) -> bool:
    """Whether nothing of the sweep may work beside `task`, which is so unless it says otherwise."""
    return bool(getattr(task, "is_timed", True))


Payload = dict[str, Any]
"""What one batch gave, as JSON holds it: dict with text keys, list, text, int, float, bool, None."""


def joined(payloads: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the rows of all batches by example id."""
    return {name: row for payload in payloads for name, row in payload.items()}


class BatchTask(ABC):
    """A quality task: its numbers are a function of the cell, never of the machine or of time.

    Every batch is measured on its own, perhaps in another process, and `summarise` sees only payloads.
    """

    protocol: ClassVar[str]
    is_timed: ClassVar[bool] = False

    @abstractmethod
    def measure(self, bench: Bench, part: Part) -> Payload:
        """Measure one planned batch."""

    @abstractmethod
    def summarise(self, bench: Bench, payloads: Sequence[Payload]) -> TaskResult:
        """Return the result of all batches, in their order."""

    def run(self, bench: Bench) -> TaskResult:
        """Measure all batches of one cell, one after the other."""
        payloads = []
        for number in range(len(bench.prompts)):
            part = bench.prompts.part(number)
            payloads.append(self.measure(bench, part))
            bench.advance(len(part.examples) / len(bench.examples))
        return self.summarise(bench, payloads)
