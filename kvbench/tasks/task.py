"""What a task gets and gives back; a task never knows which policy it runs.

A task that is measured batch by batch, so that cells can share prompts and a kill costs one batch.

The full cache's own greedy answers, computed once and stored by key.

They are the reference of `rougeL_vs_full` and of fidelity. Kept as files beside the records, so that
every cell of a sweep, and the next sweep, compares with the same texts.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol

from kvbench.cache import UNLIMITED, Policy
from kvbench.datasets.base import Dataset, Example
from kvbench.measures import bounds_on_scale
from kvbench.models.loader import LoadedModel
from kvbench.results.files import canonical_json, replace_file
from kvbench.results.record import cell_key
from kvbench.stats.intervals import Interval
from kvbench.tasks.decode import CacheSetting
from kvbench.tasks.prompts import Part, Prompts

Answers = dict[str, list[int]]


@dataclass(frozen=True, kw_only=True)
class FullAnswers:
    """Answers under `folder` for one model and data set, described by `settings`."""

    folder: Path
    settings: Mapping[str, Any]

    def get(self, max_new_tokens: int, compute: Callable[[], Answers]) -> Answers:
        """Return token ids by example id; `compute` runs when they are not stored or not readable."""
        settings = {**self.settings, "max_new_tokens": max_new_tokens}
        path = self.folder / f"{cell_key(settings)[:16]}.json"
        stored = _read(path, settings)
        if stored is None:
            stored = compute()
            content = {"settings": settings, "answers": stored, "sha256": _digest(stored)}
            replace_file(path, canonical_json(content).encode())
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

    @property
    def clusters(self) -> list[str]:
        """The cluster of each example."""
        return [example.cluster for example in self.examples]

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


def is_timed(task: object) -> bool:
    """Whether nothing of the sweep may work beside `task`, which is so unless it says otherwise."""
    return bool(getattr(task, "is_timed", True))


Payload = dict[str, Any]
"""What one batch gave, as JSON holds it: dict with text keys, list, text, int, float, bool, None."""


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
