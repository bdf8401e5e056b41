"""Launch the search for the entry of a given rank."""

from __future__ import annotations

import torch
from torch import Tensor

from kvbench.kernels.rank_kernel import find_rank

_BLOCK_SLOTS = 1024


def slot_of_rank(position: Tensor, rank: Tensor) -> Tensor:
    """Return (B, H) int64: the slot with `rank` (B, H) older entries; position (B, H, C) int64, -1 is empty."""
    batch, heads, capacity = position.shape
    slot = torch.empty((batch, heads), dtype=torch.int64, device=position.device)
    find_rank[(batch * heads,)](
        position.contiguous(), rank.contiguous(), slot, capacity, BLOCK_C=_BLOCK_SLOTS, num_warps=4
    )
    return slot
