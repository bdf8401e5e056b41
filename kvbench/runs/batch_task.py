"""A task that is measured batch by batch, so that cells can share prompts and a kill costs one batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from kvbench.runs.prompts import Part
from kvbench.runs.task import Bench, TaskResult

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
