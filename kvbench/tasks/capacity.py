"""How many prompts fit together: what eviction buys when memory is the limit.

At a fixed batch a smaller cache saves a few reads. Its larger worth is that more prompts fit beside the weights, so the
largest batch of the policy and that of the full cache are searched and each is timed at its own.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from kvbench.errors import check_within, ran_out_of_memory
from kvbench.models.inputs import prompt_batch
from kvbench.stats.intervals import launch_interval, ratio_interval
from kvbench.tasks.decode import CacheSetting
from kvbench.tasks.memory import empty_allocator
from kvbench.tasks.speed import Launch, launch, repeated
from kvbench.tasks.task import Bench, TaskResult

if TYPE_CHECKING:
    from kvbench.cache import PolicyCache

_ARMS = ("", "full_")


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """The largest batch by doubling and then halving the gap, each try a whole launch in this process.

    A batch fits if its launch of `new_tokens` ends; out of memory is an answer, and every try is in the
    curve `capacity_tries`. The search stops at `max_batch_size`, which on a CPU is the only limit that
    does not end the process. Then each arm runs `num_launches` at its own largest batch, interleaved; what
    those of the policy hold is noted, of each device too.
    Raises: torch.OutOfMemoryError if not even one prompt fits with the policy.
    """

    protocol: ClassVar[str] = "largest_batch_v1"
    reads_text: ClassVar[bool] = False

    new_tokens: int = 48
    num_launches: int = 3
    max_batch_size: int = 1024

    def __post_init__(self) -> None:
        check_within("task.capacity", self, new_tokens=(3, None), num_launches=(1, None), max_batch_size=(1, None))

    def run(self, bench: Bench) -> TaskResult:
        """Search for both arms, then time them; without a full cache that fits, the policy alone."""
        result = TaskResult()
        tries = result.curves["capacity_tries"] = []
        arms = (bench.setting, bench.full)
        sizes = []
        for number, setting in enumerate(arms):

            def fits(size: int, setting: CacheSetting = setting, number: int = number) -> bool:
                done = self._try(bench, setting, size) is not None
                tries.append([number, size, float(done)])
                return done

            sizes.append(largest_that_fits(fits, self.max_batch_size))
            bench.advance(0.4)
        if sizes[0] == 0:
            raise torch.OutOfMemoryError("not even one prompt fits beside the weights")
        launches: list[list[Launch]] = [[], []]
        held = Held(devices=bench.loaded.devices)
        for _ in range(self.num_launches):
            with held.watched():
                launches[0].append(self._launch(bench, arms[0], sizes[0], observe=held.look))
            if sizes[1]:
                launches[1].append(self._launch(bench, arms[1], sizes[1]))
        self._summarise(result, sizes, launches)
        held.note(result)
        bench.advance(0.2)
        return result

    def _launch(
        self,
        bench: Bench,
        setting: CacheSetting,
        size: int,
        *,
        observe: Callable[[PolicyCache], None] = lambda cache: None,
    ) -> Launch:
        empty_allocator(bench.loaded.device)
        batch = prompt_batch(bench.loaded, repeated(bench.examples, size))
        return launch(bench.loaded, batch, setting, self.new_tokens, observe=observe)

    def _try(self, bench: Bench, setting: CacheSetting, size: int) -> Launch | None:
        """Return None when memory does not suffice; what the launch held is let go outside of the handler."""
        try:
            return self._launch(bench, setting, size)
        except (RuntimeError, MemoryError) as error:
            if not ran_out_of_memory(error):
                raise
        gc.collect()  # what a traceback still holds in a cycle
        return None

    def _summarise(self, result: TaskResult, sizes: list[int], launches: list[list[Launch]]) -> None:
        rates = [
            [self.new_tokens * size / done.total_s for done in arm] for size, arm in zip(sizes, launches, strict=True)
        ]
        for prefix, size, rate in zip(_ARMS, sizes, rates, strict=True):
            reached = size == self.max_batch_size
            method = "the limit of the search, not of the memory" if reached else "doubling, then halving the gap"
            result.note(f"{prefix}capacity_prompts", float(size), "prompts", method=method)
            if rate:
                result.measure(f"{prefix}capacity_throughput_tokens_per_s", launch_interval(rate), "tokens/s")
        if sizes[1]:
            result.note("capacity_ratio_to_full", sizes[0] / sizes[1], method="of two counts")
            result.measure("capacity_throughput_ratio_to_full", ratio_interval(rates[0], rates[1]))


@dataclass(kw_only=True)
class Held:
    """What launches held on each device: the most of all tensors, which only a GPU's allocator tells, and the cache."""

    devices: Sequence[torch.device]

    def __post_init__(self) -> None:
        self._peaks = dict.fromkeys(self.devices, 0)
        self._kv = dict.fromkeys(self.devices, 0)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Take the peaks of a launch that runs inside."""
        on_gpus = [device for device in self.devices if device.type == "cuda"]
        for device in on_gpus:
            torch.cuda.reset_peak_memory_stats(device)
        yield
        for device in on_gpus:
            self._peaks[device] = max(self._peaks[device], torch.cuda.max_memory_allocated(device))

    def look(self, cache: PolicyCache) -> None:
        """Take what the cache stores now, after the prompt or at the end."""
        self._kv |= {device: cache.occupancy(device).stored_bytes for device in cache.devices}

    def note(self, result: TaskResult) -> None:
        """Add the sums, and the numbers of each device where there are several."""
        for name, found in (("capacity_peak_bytes", self._peaks), ("capacity_kv_bytes", self._kv)):
            if any(found.values()):
                result.note(name, sum(found.values()), "bytes")
                result.note_devices(name, list(found.values()), "bytes")


def largest_that_fits(fits: Callable[[int], bool], limit: int) -> int:
    """Return the largest size in 1 to `limit` that `fits`, 0 if none does; a size fits if a larger one does."""
    good, bad = 0, 1
    while bad <= limit and fits(bad):
        good, bad = bad, 2 * bad
    bad = min(bad, limit + 1)
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good
