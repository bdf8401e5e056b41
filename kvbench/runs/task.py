"""What a task gets and gives back; a task never knows which policy it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from kvbench.cache import UNLIMITED, Policy
from kvbench.datasets.base import Dataset, Example
from kvbench.metrics.intervals import Interval
from kvbench.models.inputs import PromptBatch, prompt_batch
from kvbench.models.loader import LoadedModel
from kvbench.runs.full_answers import FullAnswers
from kvbench.runs.loop import CacheSetting


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Everything a task may use. `advance(share)` moves the cell's progress bar, shares add up to 1.

    `full` is the full cache as a setting of its own; `answers` gives its greedy answers, computed once
    per model, data set and length.
    """

    loaded: LoadedModel
    dataset: Dataset
    examples: Sequence[Example]
    setting: CacheSetting
    full_policy: Policy
    answers: FullAnswers
    batch_size: int
    advance: Callable[[float], None]

    @property
    def full(self) -> CacheSetting:
        """The full cache at original positions: what everything is compared with."""
        return CacheSetting(policy=self.full_policy, budget=UNLIMITED, positions="original", engine=self.setting.engine)

    @property
    def clusters(self) -> list[str]:
        """The cluster of each example."""
        return [example.cluster for example in self.examples]

    def batches(self) -> list[tuple[Sequence[Example], PromptBatch]]:
        """Return the planned batches; membership depends on the list of examples only."""
        size = self.batch_size
        parts = [self.examples[start : start + size] for start in range(0, len(self.examples), size)]
        return [(part, prompt_batch(self.loaded, part)) for part in parts]


@dataclass(kw_only=True)
class TaskResult:
    """Measurements by name, rows by example id, curves by name; as the record stores them."""

    measurements: dict[str, dict[str, Any]] = field(default_factory=dict)
    samples: dict[str, dict[str, Any]] = field(default_factory=dict)
    curves: dict[str, list[list[float]]] = field(default_factory=dict)

    def measure(self, name: str, interval: Interval, unit: str = "") -> None:
        """Add one measurement."""
        self.measurements[name] = interval.as_measurement(unit)

    def add(self, other: TaskResult) -> None:
        """Merge another task's result; rows of one example become one row."""
        self.measurements |= other.measurements
        self.curves |= other.curves
        for example_id, row in other.samples.items():
            self.samples.setdefault(example_id, {}).update(row)


class Task(Protocol):
    """One measurement pass, a frozen dataclass whose fields are its settings.

    `protocol` names the definition of what it measures; a change of definition is a new name. A task
    that looks at no text, so that random weights and random prompts serve it, says `reads_text = False`.
    """

    protocol: ClassVar[str]

    def run(self, bench: Bench) -> TaskResult:
        """Measure. Raises: MeasureError when a number contradicts itself."""
