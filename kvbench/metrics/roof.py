"""The memory roof of a decode step: bytes that it must read, over the bandwidth that a copy reaches.

A step reads the weights of the decoder and the entries it attends to at least once. At the batch
sizes of decoding nothing else is as slow, so no implementation on this device can be faster.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch

from kvbench.metrics.clock import Marks

_CUDA_BYTES = 512 * 2**20  # ten times the largest L2
_CPU_BYTES = 64 * 2**20
_NUM_COPIES = 9


def step_weight_bytes(model: Any) -> int:
    """Return the bytes of weights that one decode step reads.

    Everything in the text decoder and the output head; of an embedding table a step reads some rows
    only, so it counts only where it is the head too. The vision tower does not run at decode.
    """
    head = model.get_output_embeddings()
    parameters = {id(p): p for part in (model.get_decoder(), head) for p in part.parameters()}
    if model.get_input_embeddings().weight is not head.weight:
        parameters.pop(id(model.get_input_embeddings().weight), None)
    return sum(p.numel() * p.element_size() for p in parameters.values())


def copy_bandwidth(device: torch.device) -> float:
    """Return bytes read and written per second by copying a large buffer, the median of some copies.

    The buffer is larger than the device's caches: 512 MiB on a GPU, 64 MiB on a CPU.
    """
    size = _CUDA_BYTES if device.type == "cuda" else _CPU_BYTES
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    marks = Marks(device)
    for _ in range(_NUM_COPIES + 1):
        marks.mark()
        target.copy_(source)
    marks.mark()
    return 2 * size / (statistics.median(marks.between_ms()[1:]) / 1e3)
