"""Time in milliseconds on any device: waited for, or marked without waiting."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch


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


def _elapsed_ms(before: float | torch.cuda.Event, after: float | torch.cuda.Event) -> float:
    if isinstance(before, float) and isinstance(after, float):
        return after - before
    assert not isinstance(before, float)
    assert not isinstance(after, float)
    return float(before.elapsed_time(after))
