"""Peak memory of tensors, phase by phase, on any device.

On CUDA the allocator knows. On a CPU nothing does: resident memory holds libraries and whatever the
allocator keeps, megabytes that no policy can move. So tensors are counted as torch makes them, by
their storages; what a kernel uses inside itself is not seen. The process's resident peak is noted beside.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_RESET_SLACK_BYTES = 8 * 2**20


@dataclass(kw_only=True)
class PhasePeaks:
    """Peak bytes by phase. `base_bytes`: what was alive before, and on a CPU is not counted by itself.

    A phase inside another one interrupts it: each moment belongs to the innermost phase only, and a
    phase that is entered many times has the largest of its peaks. reserved_bytes: the most that the
    allocator of a GPU held, 0 on a CPU.
    """

    device: torch.device
    base_bytes: int
    peak_bytes: dict[str, int] = field(default_factory=dict)
    reserved_bytes: int = 0

    def __post_init__(self) -> None:
        self._counter = StorageCounter()
        self._open: list[str] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Note the peak of what runs inside under `name`, weights and earlier tensors included."""
        self._boundary()
        outermost = not self._open and self.device.type != "cuda"
        self._open.append(name)
        try:
            with self._counter if outermost else nullcontext():
                yield
        finally:
            self._boundary()
            self._open.pop()

    def _boundary(self) -> None:
        """Give the peak since the last boundary to the phase that was running, and start a new one."""
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
            if self._open:
                self.reserved_bytes = max(self.reserved_bytes, torch.cuda.max_memory_reserved(self.device))
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            peak = self.base_bytes + self._counter.peak_bytes
            self._counter.peak_bytes = self._counter.live_bytes
        if self._open:
            self.peak_bytes[self._open[-1]] = max(peak, self.peak_bytes.get(self._open[-1], 0))


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
        known_before = {_storage_id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and _storage_id(leaf) not in known_before:
                self._add(leaf)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        number, size = _storage_id(tensor), storage.nbytes()
        if number in self._known:
            return
        self._known.add(number)
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._free, number, size)

    def _free(self, number: int, size: int) -> None:
        self._known.discard(number)
        self.live_bytes -= size


def parameter_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of weights and buffers, shared storages once."""
    tensors = (*model.parameters(), *model.buffers())
    return sum({_storage_id(t): t.untyped_storage().nbytes() for t in tensors}.values())


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


def _storage_id(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
