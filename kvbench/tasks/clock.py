"""How time is taken, and what says whether a time can be believed.

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
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import nn


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

    The buffer is larger than the device's caches: 512 MiB on a GPU, 64 MiB on a CPU. One cell may find the machine
    busy, so reports take the median over the cells of a machine and sweep (`kvbench/report/load.py`).
    """
    size = _CUDA_BYTES if device.type == "cuda" else _CPU_BYTES
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    times_ms = repeated_ms(lambda: target.copy_(source), _NUM_COPIES + 1, device)
    return 2 * size / (statistics.median(times_ms[1:]) / 1e3)


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
