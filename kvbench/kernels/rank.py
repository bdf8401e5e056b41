"""Launch the search for the entry of a given rank."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from kvbench.kernels.rank_kernel import find_rank

_MOST_IN_REGISTERS = 2048
_ONE_WARP = 512


def slot_of_rank(position: Tensor, rank: Tensor) -> Tensor:
    """Return (B, H) int64: the slot with `rank` (B, H) older entries; position (B, H, C) int64, -1 is empty."""
    return _search(position, rank.contiguous())


def slot_before_newest(position: Tensor, newer: int, sinks: int) -> Tensor:
    """Return (B, H) int64: the slot with `newer` newer entries, as in `selection.entry_before_newest`."""
    return _search(position, None, newer=newer, sinks=sinks)


def _search(position: Tensor, rank: Tensor | None, *, newer: int = 0, sinks: int = 0) -> Tensor:
    batch, heads, capacity = position.shape
    slot = torch.empty((batch, heads), dtype=torch.int64, device=position.device)
    block = min(triton.next_power_of_2(capacity), _MOST_IN_REGISTERS)
    find_rank[(batch * heads,)](
        position.contiguous(),
        slot if rank is None else rank,
        slot,
        capacity,
        newer,
        sinks,
        BLOCK_C=block,
        IN_ONE=capacity <= block,
        FROM_NEWEST=rank is None,
        num_warps=1 if block <= _ONE_WARP else 4,
    )
    return slot
