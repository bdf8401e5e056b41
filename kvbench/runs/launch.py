"""One timed launch: a prompt and a fixed number of decode steps, end tokens do not stop it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kvbench.datasets.base import Example
from kvbench.metrics.clock import Marks, synchronised_ms
from kvbench.models.inputs import PromptBatch
from kvbench.models.loader import LoadedModel
from kvbench.runs.loop import CacheSetting

if TYPE_CHECKING:
    from kvbench.cache import PolicyCache


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """Time to the first token, of it the time spent settling the prompt, and the time of each decode step, in ms.

    prepare_ms: what an engine does once before the first step; in no other number.
    """

    ttft_ms: float
    steps_ms: list[float]
    settle_ms: float = 0.0
    prepare_ms: float = 0.0

    @property
    def tpot_ms(self) -> float:
        """The median step."""
        return statistics.median(self.steps_ms)

    @property
    def tpot_p90_ms(self) -> float:
        """The step that nine tenths do not exceed."""
        return sorted(self.steps_ms)[(9 * len(self.steps_ms) - 1) // 10]

    @property
    def total_s(self) -> float:
        """The whole launch."""
        return (self.ttft_ms + sum(self.steps_ms)) / 1e3


@torch.inference_mode()
def launch(
    loaded: LoadedModel,
    batch: PromptBatch,
    setting: CacheSetting,
    new_tokens: int,
    *,
    observe: Callable[[PolicyCache], None] = lambda cache: None,
) -> Launch:
    """Run one launch; nothing waits for the device between two marks of one clock.

    `observe` gets the cache after the prompt and after the last step, outside of every timed stretch. Raises:
    PolicyError if a victim was no choice (`PolicyCache.check`).
    """
    device = loaded.device
    prompt, settling, steps = Marks(device), Marks(device), Marks(device)
    synchronised_ms(device)
    with prompt.around():
        decoding = setting.decoding(loaded, batch, new_tokens, on_settle=settling.around)
        token = decoding.logits.argmax(dim=-1)
    ttft_ms, settle_ms = prompt.inside_ms(), settling.inside_ms()
    observe(decoding.cache)
    start_ms = synchronised_ms(device)
    decoding.prepare()
    prepare_ms = synchronised_ms(device) - start_ms
    steps.mark()
    for _ in range(new_tokens - 1):
        token = decoding.step(token).argmax(dim=-1)
        steps.mark()
    steps_ms = steps.between_ms()
    decoding.cache.check()
    observe(decoding.cache)
    return Launch(ttft_ms=ttft_ms, steps_ms=steps_ms, settle_ms=settle_ms, prepare_ms=prepare_ms)


def repeated(examples: Sequence[Example], number: int) -> list[Example]:
    """Return `number` examples, from the first on, again where there are fewer."""
    return [examples[index % len(examples)] for index in range(number)]
