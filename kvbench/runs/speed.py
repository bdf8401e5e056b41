"""Latency of the policy beside the full cache's, interleaved in one process.

A launch is one prompt and a fixed number of decode steps (end tokens do not stop it). Launches come
in the order A B B A, A the policy and B the full cache, so that drift of the machine hits both alike.
The launch is the unit of replication: intervals are over launch medians, never over single steps.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch

from kvbench.errors import ConfigError
from kvbench.metrics.clock import synchronised_ms
from kvbench.metrics.intervals import launch_interval, ratio_interval
from kvbench.models.inputs import PromptBatch, prompt_batch
from kvbench.runs.loop import CacheSetting
from kvbench.runs.task import Bench, TaskResult


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """One launch: time to the first token, then the time of each decode step, in ms."""

    ttft_ms: float
    steps_ms: list[float]

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


@dataclass(frozen=True, kw_only=True)
class Speed:
    """`num_blocks` blocks of four launches (A B B A) after `num_warmups` of each arm.

    batch_size prompts run together; new_tokens are generated per launch, prompt's token included.
    """

    protocol: ClassVar[str] = "abba_v1"
    reads_text: ClassVar[bool] = False

    new_tokens: int = 48
    num_blocks: int = 3
    num_warmups: int = 1
    batch_size: int = 1

    def __post_init__(self) -> None:
        if self.new_tokens < 3 or self.num_blocks < 1 or self.num_warmups < 1 or self.batch_size < 1:
            raise ConfigError(
                f"task.speed has new_tokens={self.new_tokens}, num_blocks={self.num_blocks}, "
                f"num_warmups={self.num_warmups}, batch_size={self.batch_size}; allowed: >= 3, >= 1, >= 1, >= 1"
            )

    def run(self, bench: Bench) -> TaskResult:
        """Time both arms; the first examples are the prompts, the same for both."""
        batch = prompt_batch(bench.loaded, bench.examples[: self.batch_size])
        arms = (bench.setting, bench.full)
        for _ in range(self.num_warmups):
            for arm in arms:
                self._launch(bench, batch, arm)
        policy, full = [], []
        for block in range(self.num_blocks):
            first, second, third, fourth = (self._launch(bench, batch, arms[k]) for k in (0, 1, 1, 0))
            policy += [first, fourth]
            full += [second, third]
            bench.advance((block + 1) / self.num_blocks - block / self.num_blocks)
        result = TaskResult()
        self._summarise(result, policy, full, len(batch.prompt_tokens))
        return result

    @torch.inference_mode()
    def _launch(self, bench: Bench, batch: PromptBatch, setting: CacheSetting) -> Launch:
        device = bench.loaded.device
        start_ms = synchronised_ms(device)
        decoding = setting.decoding(bench.loaded, batch, self.new_tokens)
        token = decoding.logits.argmax(dim=-1)
        times_ms = [synchronised_ms(device)]
        for _ in range(self.new_tokens - 1):
            token = decoding.step(token).argmax(dim=-1)
            times_ms.append(synchronised_ms(device))
        steps_ms = [after - before for before, after in pairwise(times_ms)]
        return Launch(ttft_ms=times_ms[0] - start_ms, steps_ms=steps_ms)

    def _summarise(self, result: TaskResult, policy: Sequence[Launch], full: Sequence[Launch], batch_size: int) -> None:
        result.measure("ttft_ms", launch_interval([launch.ttft_ms for launch in policy]), "ms")
        result.measure("tpot_ms", launch_interval([launch.tpot_ms for launch in policy]), "ms")
        result.measure("tpot_p90_ms", launch_interval([launch.tpot_p90_ms for launch in policy]), "ms")
        tokens = self.new_tokens * batch_size
        throughput = launch_interval([tokens / launch.total_s for launch in policy])
        result.measure("throughput_tokens_per_s", throughput, "tokens/s")
        ttft_ratio = ratio_interval([a.ttft_ms for a in policy], [b.ttft_ms for b in full])
        tpot_ratio = ratio_interval([a.tpot_ms for a in policy], [b.tpot_ms for b in full])
        result.measure("ttft_ratio_to_full", ttft_ratio)
        result.measure("tpot_ratio_to_full", tpot_ratio)
        result.curves["launches_ms"] = [
            [ours.ttft_ms, ours.tpot_ms, theirs.ttft_ms, theirs.tpot_ms]
            for ours, theirs in zip(policy, full, strict=True)
        ]
