"""Latency of the policy beside the full cache's, interleaved in one process, and what says that a time can be believed.

A launch is a prompt and a fixed number of decode steps, which end tokens do not stop. Launches come in the order A B B
A, A the policy and B the full cache, so that drift of the machine hits both alike. The launch is the unit of
replication: intervals are over launch medians, never over single steps. A pass on a noisy machine is measured once
more; what is noisy then is shown as noisy. What deciding costs at a decode step is measured alone.

`Marks` note points in the work of any device without waiting for it. `copy_bandwidth` and `step_weight_bytes` make the
memory roof of a decode step: it reads the decoder's weights and the entries it attends to at least once, and at the
batch sizes of decoding nothing else is as slow. Where layers lie on several devices each is read at its own device's
bandwidth, one after the other. `reference_ms` is the same work at the start and at the end of a timing
pass, `foreign_gpu_processes` who else is there. `around_vision` finds where pictures are encoded in a model's forward.
"""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from kvbench.cache import Policy
from kvbench.datasets.base import Example
from kvbench.errors import PolicyError, check_within, ran_out_of_memory
from kvbench.models.inputs import PromptBatch, prompt_batch
from kvbench.models.loader import LoadedModel
from kvbench.stats.intervals import Interval, launch_interval, ratio_interval
from kvbench.stats.paired import noise_reason, spread_fraction
from kvbench.tasks.decode import CacheSetting, captured, warm_up
from kvbench.tasks.task import Bench, TaskResult

if TYPE_CHECKING:
    from kvbench.cache import PolicyCache


def synchronised_ms(device: torch.device) -> float:
    """Return a monotonic time after everything queued on `device` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() * 1e3


class Marks:
    """Points in the work of a device, noted without waiting and read once at the end.

    CUDA events on a GPU, which lie in the stream between the kernels; the host's clock elsewhere.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._points: list[float | torch.cuda.Event] = []

    def mark(self) -> None:
        """Note where the device's work stands now."""
        if self._device.type != "cuda":
            self._points.append(time.perf_counter() * 1e3)
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        self._points.append(event)

    @contextmanager
    def around(self) -> Iterator[None]:
        """Mark before and after what runs inside."""
        self.mark()
        yield
        self.mark()

    def between_ms(self) -> list[float]:
        """Return the time from each mark to the next; waits for the device."""
        synchronised_ms(self._device)
        return [_elapsed_ms(before, after) for before, after in pairwise(self._points)]

    def inside_ms(self) -> float:
        """Return the time that passed inside all `around`, no other marks having been made."""
        return sum(self.between_ms()[::2])


class DeviceMarks:
    """The marks of each device by itself: an event lies in the work of one."""

    def __init__(self) -> None:
        self._marks: dict[torch.device, Marks] = {}
        self._open: set[torch.device] = set()

    @contextmanager
    def around(self, device: torch.device) -> Iterator[None]:
        """Mark on `device` before and after what runs inside; inside of another one there it is part of that."""
        if device in self._open:
            yield
            return
        self._open.add(device)
        with self._marks.setdefault(device, Marks(device)).around():
            yield
        self._open.remove(device)

    def inside_ms(self) -> float:
        """Return the time that passed inside, the devices' added up: the layers of a model run one after the other."""
        return sum(marks.inside_ms() for marks in self._marks.values())


def _elapsed_ms(before: float | torch.cuda.Event, after: float | torch.cuda.Event) -> float:
    if isinstance(before, float) or isinstance(after, float):
        assert isinstance(before, float)
        assert isinstance(after, float)
        return after - before
    return float(before.elapsed_time(after))


def repeated_ms(work: Callable[[], object], repeats: int, device: torch.device) -> list[float]:
    """Return the time of each of `repeats` runs of `work`, one right after the other."""
    marks = Marks(device)
    for _ in range(repeats):
        marks.mark()
        work()
    marks.mark()
    return marks.between_ms()


_CUDA_BYTES = 512 * 2**20  # ten times the largest L2
_CUDA_GAPS_BYTES = (0, 2**20, 2**22 + 2**20, 2**25 + 2**21)
_CPU_BYTES = 64 * 2**20
_NUM_COPIES = 9


def step_weight_bytes(model: Any, device: torch.device | None = None) -> int:
    """Return the bytes of weights that one decode step reads, on `device` alone where given.

    Everything in the text decoder and the output head; of an embedding table a step reads some rows
    only, so it counts only where it is the head too. The vision tower does not run at decode.
    """
    head = model.get_output_embeddings()
    parameters = {id(p): p for part in (model.get_decoder(), head) for p in part.parameters()}
    if model.get_input_embeddings().weight is not head.weight:
        parameters.pop(id(model.get_input_embeddings().weight), None)
    return sum(p.numel() * p.element_size() for p in parameters.values() if device in (None, p.device))


def copy_bandwidth(device: torch.device) -> float:
    """Return bytes read and written per second by copying a large buffer, the median of some copies.

    The buffer is larger than the device's caches: 512 MiB on a GPU, 64 MiB on a CPU. On an H200 the same copy runs at
    4.17 or at 3.74 TB/s, in one process and by turns, as buffers come to lie; a roof is what the device can do, so on a
    GPU the fastest of some distances between the buffers counts, and it may be the slower one still. Reports take one
    bandwidth for the cells of a machine and sweep (`kvbench/report/load.py`).
    """
    is_gpu = device.type == "cuda"
    size, gaps = (_CUDA_BYTES, _CUDA_GAPS_BYTES) if is_gpu else (_CPU_BYTES, (0,))
    room = torch.zeros(2 * size + max(gaps), dtype=torch.uint8, device=device)
    source, found = room[:size], []
    for gap in gaps:
        target = room[size + gap : 2 * size + gap]
        found.append(statistics.median(repeated_ms(partial(target.copy_, source), _NUM_COPIES + 1, device)[1:]))
    return 2 * size / (min(found) / 1e3)


_SIZES = {"cuda": 4096, "cpu": 384}
_LAST_MS = 150.0
_MOST_REPEATS = 500


def reference_ms(device: torch.device) -> float:
    """Return the median time of a matrix product of fixed size, repeated for about 150 ms."""
    kind, dtype = ("cuda", torch.float16) if device.type == "cuda" else ("cpu", torch.float32)
    matrix = torch.full((_SIZES[kind], _SIZES[kind]), 0.5, device=device, dtype=dtype)
    found: list[float] = []
    end_ms = synchronised_ms(device) + _LAST_MS
    while len(found) < _MOST_REPEATS and (synchronised_ms(device) < end_ms or len(found) < 10):
        found.extend(repeated_ms(lambda: matrix @ matrix, 6, device)[1:])
    return statistics.median(found)


def foreign_gpu_processes(device: torch.device) -> int | None:
    """Return how many other processes compute on the GPU, by NVML's own tool; None where it can not be known.

    In a container the driver's process ids are not ours, so all but one are taken for foreign.
    """
    if device.type != "cuda":
        return None
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    gpu = uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"
    return _count_foreign(gpu)


def _count_foreign(gpu: str) -> int | None:
    command = ["nvidia-smi", "--query-compute-apps=pid", "--format=csv,noheader", f"--id={gpu}"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    processes = {line.strip() for line in output.splitlines() if line.strip().isdigit()}
    return len(processes) - 1 if processes else None


_TOWERS = ("vision_tower", "vision_model", "visual")
_PROJECTOR = "multi_modal_projector"


@contextmanager
def around_vision(model: nn.Module, phase: AbstractContextManager[None]) -> Iterator[None]:
    """Enter `phase` when the vision tower starts and leave it when its projector, or else it, has ended.

    Nothing happens in a model without a tower. `phase` is entered once at most: a prompt's pictures are
    encoded together.
    """
    parts = {name.rpartition(".")[2]: part for name, part in reversed(list(model.named_modules()))}
    tower = next((parts[name] for name in _TOWERS if name in parts), None)
    if tower is None:
        yield
        return
    running = ExitStack()

    def begin(*arguments: Any) -> None:
        running.enter_context(phase)

    def end(*arguments: Any) -> None:
        running.close()

    hooks = [tower.register_forward_pre_hook(begin), parts.get(_PROJECTOR, tower).register_forward_hook(end)]
    try:
        yield
    finally:
        running.close()
        for hook in hooks:
            hook.remove()


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
    prompt, settling, steps = Marks(device), DeviceMarks(), Marks(device)  # every pass begins and ends on `device`
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


_NUM_REPEATS = 15


def deciding_ms(cache: PolicyCache, policy: Policy) -> Interval:
    """Return the median time in which all layers name their victims; nothing is applied.

    On CUDA the work is captured in a CUDA graph and replayed, so that launching it costs nothing; what
    cannot be captured is run as it is, and the method says so. 0 for a policy that decides nothing. Of several
    devices the times are added up.
    """
    from kvbench.cache.policy import steps_between_cuts

    steps = steps_between_cuts(policy)
    if steps is None:
        return Interval(value=0.0, low=None, high=None, n=1, method="nothing is decided at decode")
    medians, ways = [], []
    for device in cache.devices:
        decide = partial(cache.decide, device)
        work, how = (decide, "run") if device.type != "cuda" else _captured(decide, device)
        work()
        medians.append(statistics.median(repeated_ms(work, _NUM_REPEATS, device)))
        ways.append(how)
    how = " and ".join(dict.fromkeys(ways)) + (f", a plan every {steps} steps" if steps > 1 else "")
    return Interval(value=sum(medians) / steps, low=None, high=None, n=_NUM_REPEATS, method=f"median of repeats, {how}")


def _captured(decide: Callable[[], None], device: torch.device) -> tuple[Callable[[], None], str]:
    try:
        warm_up(decide, device)
        graph = captured(decide, device)
    except (PolicyError, RuntimeError) as error:  # a copy from the host, or a wait for the device
        if ran_out_of_memory(error):
            raise
        torch.cuda.synchronize(device)
        return decide, "launched kernel by kernel"
    return graph.replay, "CUDA graph"


@dataclass(kw_only=True)
class Arm:
    """One of the two settings that are compared: its launches, and what its cache held in the first warm-up.

    valid_bytes: by device, after the prompt and after the last step.
    """

    setting: CacheSetting
    launches: list[Launch] = field(default_factory=list)
    valid_bytes: list[dict[torch.device, int]] = field(default_factory=list)
    deciding: Interval | None = None

    def roofs_ms(self, reads: Sequence[Reads]) -> list[float]:
        """Return, for each device, the time to read its weights and the mean of its valid entries once."""
        held = [sum(moment.get(one.device, 0) for moment in self.valid_bytes) / len(self.valid_bytes) for one in reads]
        return [(one.weight_bytes + kv) / one.bandwidth * 1e3 for one, kv in zip(reads, held, strict=True)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Reads:
    """What a decode step reads of the weights on a device, and how many bytes a copy moves there per second."""

    device: torch.device
    weight_bytes: int
    bandwidth: float


@dataclass(frozen=True, kw_only=True)
class Quiet:
    """How quiet the machine was: change of a reference kernel from start to end, other processes on the GPU, passes."""

    drift_fraction: float
    num_foreign: int | None
    num_passes: int = 1


@dataclass(frozen=True, kw_only=True)
class Speed:
    """`num_blocks` blocks of four launches (A B B A) after `num_warmups` of each arm.

    batch_size prompts run together, examples being repeated where there are fewer; new_tokens are
    generated per launch, prompt's token included.
    """

    protocol: ClassVar[str] = "abba_v3"
    reads_text: ClassVar[bool] = False

    new_tokens: int = 48
    num_blocks: int = 3
    num_warmups: int = 1
    batch_size: int = 1

    def __post_init__(self) -> None:
        check_within(
            "task.speed", self, new_tokens=(3, None), num_blocks=(1, None), num_warmups=(1, None), batch_size=(1, None)
        )

    def run(self, bench: Bench) -> TaskResult:
        """Time both arms; the first examples are the prompts, the same for both."""
        reads = [reads_of(bench.loaded.model, device) for device in bench.loaded.devices]
        batch = prompt_batch(bench.loaded, repeated(bench.examples, self.batch_size))
        policy, full = Arm(setting=bench.setting), Arm(setting=bench.full)
        self._warm_up(bench, batch, (policy, full))
        quiet = self._blocks(bench, batch, policy, full)
        if _is_noisy(policy, full, quiet):
            quiet = replace(self._blocks(bench, batch, policy, full), num_passes=2)
        bench.advance(1.0)
        result = TaskResult(is_noisy=_is_noisy(policy, full, quiet))
        self._latency(result, policy, full)
        _noise(result, policy, full, quiet)
        _roof(result, policy, full, reads)
        return result

    def _blocks(self, bench: Bench, batch: PromptBatch, policy: Arm, full: Arm) -> Quiet:
        """Time all blocks; launches of a pass before are forgotten whole, never some of them."""
        devices = bench.loaded.devices
        before_ms = [reference_ms(device) for device in devices]
        policy.launches, full.launches = [], []
        for _ in range(self.num_blocks):
            for arm in (policy, full, full, policy):
                arm.launches.append(launch(bench.loaded, batch, arm.setting, self.new_tokens))
        drifts = [abs(reference_ms(device) / before - 1) for device, before in zip(devices, before_ms, strict=True)]
        foreign = [found for found in map(foreign_gpu_processes, devices) if found is not None]
        return Quiet(drift_fraction=max(drifts), num_foreign=max(foreign, default=None))

    def _warm_up(self, bench: Bench, batch: PromptBatch, arms: Sequence[Arm]) -> None:
        """Run both arms untimed; the first round looks into the caches, which would disturb a timed one."""
        for arm in arms:
            launch(bench.loaded, batch, arm.setting, self.new_tokens, observe=_observer(arm))
        for _ in range(self.num_warmups - 1):
            for arm in arms:
                launch(bench.loaded, batch, arm.setting, self.new_tokens)

    def _latency(self, result: TaskResult, policy: Arm, full: Arm) -> None:
        ours, theirs = policy.launches, full.launches
        for name in ("ttft_ms", "tpot_ms", "tpot_p90_ms", "settle_ms", "prepare_ms"):
            result.measure(name, launch_interval([getattr(a, name) for a in ours]), "ms")
        for name in ("ttft_ms", "tpot_ms"):
            both = [[getattr(one, name) for one in arm] for arm in (ours, theirs)]
            result.measure(f"full_{name}", launch_interval(both[1]), "ms")
            result.measure(f"{name.removesuffix('_ms')}_ratio_to_full", ratio_interval(*both))
        if policy.deciding is not None:
            result.measure("policy_ms", policy.deciding, "ms")
        tokens = self.new_tokens * self.batch_size
        result.measure("throughput_tokens_per_s", launch_interval([tokens / a.total_s for a in ours]), "tokens/s")
        throughput = ratio_interval([b.total_s for b in theirs], [a.total_s for a in ours])
        result.measure("throughput_ratio_to_full", throughput)
        result.curves["launches_ms"] = [
            [a.ttft_ms, a.tpot_ms, b.ttft_ms, b.tpot_ms] for a, b in zip(ours, theirs, strict=True)
        ]


def _spread(name: str, *arms: Arm) -> float | None:
    return spread_fraction(*([getattr(one, name) for one in arm.launches] for arm in arms))


def _is_noisy(policy: Arm, full: Arm, quiet: Quiet) -> bool:
    return bool(noise_reason(_spread("tpot_ms", policy, full), quiet.drift_fraction, quiet.num_foreign))


def _noise(result: TaskResult, policy: Arm, full: Arm, quiet: Quiet) -> None:
    """Note what decides whether the times are called noisy."""
    seen = {
        "tpot_spread_fraction": _spread("tpot_ms", policy, full),
        "ttft_spread_fraction": _spread("ttft_ms", policy, full),
        "reference_drift_fraction": quiet.drift_fraction,
        "foreign_gpu_processes": quiet.num_foreign,
        "timing_passes": quiet.num_passes,
    }
    for name, value in seen.items():
        if value is not None:
            result.note(name, float(value))


def _observer(arm: Arm) -> Callable[[PolicyCache], None]:
    """Note the entries held after the prompt and after the last step, and then what deciding costs."""

    def observe(cache: PolicyCache) -> None:
        arm.valid_bytes.append({device: cache.occupancy(device).valid_bytes for device in cache.devices})
        if len(arm.valid_bytes) == 2:
            arm.deciding = deciding_ms(cache, arm.setting.policy)

    return observe


def reads_of(model: Any, device: torch.device) -> Reads:
    """Measure how fast a copy is on `device`, and count the bytes of weights of `model` that a step reads there."""
    return Reads(device=device, weight_bytes=step_weight_bytes(model, device), bandwidth=copy_bandwidth(device))


def _roof(result: TaskResult, policy: Arm, full: Arm, reads: Sequence[Reads]) -> None:
    """Note the roofs: the layers of several devices run one after the other, so theirs add up."""
    for prefix, arm in (("", policy), ("full_", full)):
        each_ms = arm.roofs_ms(reads)
        roof_ms = sum(each_ms)
        result.note(f"{prefix}roof_ms", roof_ms, "ms", method="computed")
        result.measure(f"{prefix}roof_share_fraction", launch_interval([roof_ms / a.tpot_ms for a in arm.launches]))
        result.note_devices(f"{prefix}roof_ms", each_ms, "ms", method="computed")
    bandwidths = [one.bandwidth for one in reads]
    weights = sum(one.weight_bytes for one in reads)
    copies = "fastest of some distances, medians of copies" if reads[0].device.type == "cuda" else "median of copies"
    method = copies
    if len(reads) > 1:
        whole = weights / sum(one.weight_bytes / one.bandwidth for one in reads)
        method += ", the weights' bytes over the time to read them device by device"
    else:
        whole = bandwidths[0]
    result.note("copy_bandwidth_bytes_per_s", whole, "bytes/s", method=method)
    result.note_devices("copy_bandwidth_bytes_per_s", bandwidths, "bytes/s", method=copies)
