"""The same work at the start and at the end of a timing pass: how much slower or faster the machine became."""

from __future__ import annotations

import statistics
import subprocess

import torch

from kvbench.metrics.clock import Marks, synchronised_ms

_SIZES = {"cuda": 4096, "cpu": 384}
_LAST_MS = 150.0
_MOST_REPEATS = 500


def reference_ms(device: torch.device) -> float:
    """Return the median time of a matrix product of fixed size, repeated for about 150 ms."""
    size = _SIZES["cuda" if device.type == "cuda" else "cpu"]
    matrix = torch.full(
        (size, size), 0.5, device=device, dtype=torch.float16 if device.type == "cuda" else torch.float32
    )
    found: list[float] = []
    end_ms = synchronised_ms(device) + _LAST_MS
    while len(found) < _MOST_REPEATS and (synchronised_ms(device) < end_ms or len(found) < 10):
        marks = Marks(device)
        for _ in range(6):
            marks.mark()
            matrix @ matrix
        found.extend(marks.between_ms()[1:])
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
