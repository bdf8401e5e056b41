"""Peak memory by phase, the bytes the cache really stores, and how many prompts fit together.

`Memory` is a pass of its own. On CUDA the allocator knows the peak. On a CPU nothing does: resident memory holds
libraries and whatever the allocator keeps, megabytes that no policy can move. So tensors are counted as torch makes
them, by their storages; what a kernel uses inside itself is not seen. The process's resident peak is noted beside.

`Capacity` is what eviction buys when memory is the limit. At a fixed batch a smaller cache saves a few reads. Its
larger worth is that more prompts fit beside the weights, so the largest batch of the policy and that of the full cache
are searched and each is timed at its own.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import psutil
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kvbench.cache.view import storage_id
from kvbench.errors import check_within, ran_out_of_memory
from kvbench.models.inputs import PromptBatch, prompt_batch
from kvbench.models.loader import LoadedModel
from kvbench.stats.intervals import launch_interval, ratio_interval
from kvbench.tasks.decode import CacheSetting
from kvbench.tasks.speed import Launch, around_vision, launch, repeated
from kvbench.tasks.task import Bench, TaskResult

if TYPE_CHECKING:
    from kvbench.cache import PolicyCache


_RESET_SLACK_BYTES = 8 * 2**20


@dataclass(kw_only=True)
class PhasePeaks:
    """Peak bytes by phase. `base_bytes`: what was alive before, and on a CPU is not counted by itself.

    A phase inside another one interrupts it: each moment belongs to the innermost phase only, and a
    phase that is entered many times has the largest of its peaks. by_device: the peaks of each device, by phase;
    devices reach theirs one after the other, so what they add up to is what they must hold, not a moment's total.
    """

    devices: Sequence[torch.device]
    base_bytes: int
    by_device: dict[torch.device, dict[str, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._counter = StorageCounter()
        self._open: list[str] = []
        self._reserved_bytes = dict.fromkeys(self.devices, 0)
        self.by_device = {device: {} for device in self.devices}

    @property
    def peak_bytes(self) -> dict[str, int]:
        """The peak of each phase, those of the devices added up."""
        phases = dict.fromkeys(name for peaks in self.by_device.values() for name in peaks)
        return {name: sum(peaks.get(name, 0) for peaks in self.by_device.values()) for name in phases}

    @property
    def reserved_bytes(self) -> int:
        """The most that the allocators of GPUs held, 0 on a CPU."""
        return sum(self._reserved_bytes.values())

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Note the peak of what runs inside under `name`, weights and earlier tensors included."""
        self._boundary()
        outermost = not self._open and self.devices[0].type != "cuda"
        self._open.append(name)
        try:
            with self._counter if outermost else nullcontext():
                yield
        finally:
            self._boundary()
            self._open.pop()

    def _boundary(self) -> None:
        """Give the peak since the last boundary to the phase that was running, and start a new one."""
        for device, peaks in self.by_device.items():
            if device.type == "cuda":
                peak = torch.cuda.max_memory_allocated(device)
                if self._open:
                    reserved = torch.cuda.max_memory_reserved(device)
                    self._reserved_bytes[device] = max(self._reserved_bytes[device], reserved)
                torch.cuda.reset_peak_memory_stats(device)
            else:
                peak = self.base_bytes + self._counter.peak_bytes
                self._counter.peak_bytes = self._counter.live_bytes
            if self._open:
                peaks[self._open[-1]] = max(peak, peaks.get(self._open[-1], 0))


class StorageCounter(TorchDispatchMode):
    """Counts bytes of storages made while it is active, until they are freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes = 0
        self.peak_bytes = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation, then count the storages of what it returned."""
        known_before = {storage_id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and storage_id(leaf) not in known_before:
                self._add(leaf)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        number, size = storage_id(tensor), storage.nbytes()
        if number in self._known:
            return
        self._known.add(number)
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._free, number, size)

    def _free(self, number: int, size: int) -> None:
        self._known.discard(number)
        self.live_bytes -= size


def parameter_bytes(model: torch.nn.Module, device: torch.device | None = None) -> int:
    """Return the bytes of weights and buffers, on `device` alone where given; shared storages once."""
    tensors = (t for t in (*model.parameters(), *model.buffers()) if device in (None, t.device))
    return sum({storage_id(t): t.untyped_storage().nbytes() for t in tensors}.values())


def reset_resident_peak() -> bool:
    """Start a new resident peak for this process; False where the system cannot.

    The peak is read back: it must have come down to what is resident now.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return resident_peak_bytes() <= _resident_bytes() + _RESET_SLACK_BYTES


def resident_peak_bytes() -> int:
    """Return the process's resident peak, or what is resident now where no peak is kept."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return _resident_bytes()


def _resident_bytes() -> int:
    return int(psutil.Process().memory_info().rss)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """One launch of `new_tokens` steps on the first `batch_size` prompts, peaks noted per phase.

    load = weights and buffers; vision, prefill, settle (the policy's share of the prompt) and decode =
    everything alive at the phase's peak, weights included. KV bytes at the end: stored from storages,
    theoretical what the budget implies, valid what is held, without the free slot and slots not yet
    used; beside them what attention statistics left, and the bookkeeping. Before the launch the prompt runs
    through the model without any cache: what comes on top of the weights there is the plain model's own, and
    part of the bound that the peak is compared with.
    """

    protocol: ClassVar[str] = "phases_v3"
    reads_text: ClassVar[bool] = False

    new_tokens: int = 48
    batch_size: int = 1

    def __post_init__(self) -> None:
        check_within("task.memory", self, new_tokens=(2, None), batch_size=(1, None))

    def run(self, bench: Bench) -> TaskResult:
        """Run the launch under the counters."""
        loaded = bench.loaded
        batch = prompt_batch(loaded, repeated(bench.examples, self.batch_size))
        weights_bytes = parameter_bytes(loaded.model)
        inputs_bytes = sum(tensor.untyped_storage().nbytes() for tensor in batch.tensors.values())
        activation_bytes = _plain_activation_bytes(loaded, batch, weights_bytes + inputs_bytes)
        peaks = PhasePeaks(devices=loaded.devices, base_bytes=weights_bytes + inputs_bytes)
        resident_is_fresh = reset_resident_peak()
        cache = self._launch(loaded, batch, bench.setting, peaks)
        bench.advance(1.0)
        numbers = {f"peak_{name}_bytes": value for name, value in peaks.peak_bytes.items()}
        numbers["peak_load_bytes"] = weights_bytes
        numbers["peak_memory_bytes"] = max(peaks.peak_bytes.values())
        numbers["plain_activation_bytes"] = activation_bytes
        if peaks.reserved_bytes:
            numbers["peak_reserved_bytes"] = peaks.reserved_bytes
        if resident_is_fresh:
            numbers["peak_rss_bytes"] = resident_peak_bytes()
        numbers |= _kv_bytes(cache)
        result = TaskResult()
        for name, value in numbers.items():
            result.note(name, value, "bytes")
        for name, values in _device_bytes(loaded, peaks, cache).items():
            result.note_devices(name, values, "bytes")
        bound = weights_bytes + inputs_bytes + activation_bytes + numbers["kv_theoretical_bytes"]
        bound += _entry_bytes(cache) * batch.kind.numel()
        result.note("peak_over_bound_ratio", numbers["peak_memory_bytes"] / bound)
        return result

    @torch.inference_mode()
    def _launch(self, loaded: LoadedModel, batch: PromptBatch, setting: CacheSetting, peaks: PhasePeaks) -> PolicyCache:
        empty_allocator(loaded.device, collect=True)
        with peaks.phase("prefill"), around_vision(loaded.model, peaks.phase("vision")):
            decoding = setting.decoding(loaded, batch, self.new_tokens, on_settle=lambda device: peaks.phase("settle"))
            token = decoding.logits.argmax(dim=-1)
        with peaks.phase("decode"):
            decoding.prepare()
            for _ in range(self.new_tokens - 1):
                token = decoding.step(token).argmax(dim=-1)
        decoding.cache.check()
        return decoding.cache


@torch.inference_mode()
def _plain_activation_bytes(loaded: LoadedModel, batch: PromptBatch, base_bytes: int) -> int:
    """Return the peak of the prompt's forward without any cache, above weights and inputs."""
    empty_allocator(loaded.device, collect=True)
    alive = base_bytes
    if loaded.device.type == "cuda":
        alive = sum(torch.cuda.memory_allocated(device) for device in loaded.devices)
    peaks = PhasePeaks(devices=loaded.devices, base_bytes=base_bytes)
    with peaks.phase("plain"):
        loaded.model(**batch.tensors, position_ids=batch.position_ids, use_cache=False, logits_to_keep=1)
    loaded.beat()
    return peaks.peak_bytes["plain"] - alive


def _entry_bytes(cache: PolicyCache) -> int:
    """Return the bytes of one token's key and value in one layer."""
    first = cache.policy_layers[0].keys
    assert first is not None
    _, heads, _, width = first.shape
    return 2 * heads * width * first.element_size()


def _kv_bytes(cache: PolicyCache) -> dict[str, int]:
    held = cache.occupancy()
    ledgers = [layer.ledger for layer in cache.policy_layers]
    allowed = sum(entries + ledger.block_tokens - 1 for ledger in ledgers for entries in ledger.allowed())
    return {
        "kv_stored_bytes": held.stored_bytes,
        "kv_valid_bytes": held.valid_bytes,
        "statistics_bytes": held.statistics_bytes,
        "bookkeeping_bytes": held.bookkeeping_bytes,
        "kv_theoretical_bytes": _entry_bytes(cache) * allowed,
    }


def _device_bytes(loaded: LoadedModel, peaks: PhasePeaks, cache: PolicyCache) -> dict[str, list[int]]:
    """Return the numbers that every device has by itself, in the order of the devices."""
    has_layers = cache.devices
    held = [cache.occupancy(device) if device in has_layers else None for device in loaded.devices]
    return {
        "peak_memory_bytes": [max(peaks.by_device[device].values()) for device in loaded.devices],
        "peak_load_bytes": [parameter_bytes(loaded.model, device) for device in loaded.devices],
        "kv_stored_bytes": [0 if one is None else one.stored_bytes for one in held],
        "kv_valid_bytes": [0 if one is None else one.valid_bytes for one in held],
    }


def free_memory() -> None:
    """Give back what is no longer used, so that the next measurement starts clean."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def empty_allocator(device: torch.device, *, collect: bool = False) -> None:
    """Give back what the GPUs' allocators keep for later, and what lies in a cycle; a CPU has no such thing."""
    if device.type == "cuda":
        if collect:
            gc.collect()
        torch.cuda.empty_cache()


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
