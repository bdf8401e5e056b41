"""Wall time in milliseconds with the device waited for."""

from __future__ import annotations

import time

import torch


def synchronised_ms(device: torch.device) -> float:
    """Return a monotonic time after everything queued on `device` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() * 1e3
