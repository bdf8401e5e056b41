"""Find the entry with a given number of older ones, without sorting: halve the range of positions.

Slots that fit into one block are read once and stay in registers while the range is halved.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# mypy: ignore-errors
# Kernels are written in Triton's language, not Python's.


@triton.jit
def _count_to(base, only, limit, capacity, BLOCK_C: tl.constexpr, IN_ONE: tl.constexpr):
    """Return how many entries are held at positions up to `limit`; `only` is the one block, if IN_ONE."""
    if IN_ONE:
        return tl.sum(((only >= 0) & (only <= limit)).to(tl.int32), 0)
    c = tl.arange(0, BLOCK_C)
    count = tl.zeros((BLOCK_C,), tl.int32)
    for start in range(0, capacity, BLOCK_C):
        p = tl.load(base + start + c, mask=start + c < capacity, other=-1).to(tl.int32)
        count += ((p >= 0) & (p <= limit)).to(tl.int32)
    return tl.sum(count, 0)


@triton.jit
def find_rank(
    position,
    rank,
    slot,
    capacity,
    newer,
    sinks,
    BLOCK_C: tl.constexpr,
    IN_ONE: tl.constexpr,
    FROM_NEWEST: tl.constexpr,
):
    """Slot (pair,): where the held entry lies that has `rank` older ones.

    With FROM_NEWEST the rank is that of the entry with `newer` newer ones, at least `sinks`, and never the
    newest where there is another.
    """
    pair = tl.program_id(0)
    base = position + pair.to(tl.int64) * capacity
    c = tl.arange(0, BLOCK_C)
    only = tl.load(base + c, mask=c < capacity, other=-1).to(tl.int32)
    newest = only
    for start in range(BLOCK_C, capacity, BLOCK_C):
        newest = tl.maximum(newest, tl.load(base + start + c, mask=start + c < capacity, other=-1).to(tl.int32))
    high = tl.max(newest, 0)
    low = high * 0
    if FROM_NEWEST:
        last = _count_to(base, only, high, capacity, BLOCK_C, IN_ONE) - 1
        wanted = tl.minimum(tl.maximum(last - newer, sinks), tl.maximum(last - 1, 0)) + 1
    else:
        wanted = tl.load(rank + pair).to(tl.int32) + 1
    while low < high:
        middle = (low + high) // 2
        enough = _count_to(base, only, middle, capacity, BLOCK_C, IN_ONE) >= wanted
        high = tl.where(enough, middle, high)
        low = tl.where(enough, low, middle + 1)
    found = tl.where(only == low, c, 0)
    for start in range(BLOCK_C, capacity, BLOCK_C):
        p = tl.load(base + start + c, mask=start + c < capacity, other=-1).to(tl.int32)
        found = tl.where(p == low, start + c, found)
    tl.store(slot + pair, tl.max(found, 0).to(tl.int64))


_MOST_IN_REGISTERS = 2048
_ONE_WARP = 512


def find_slot(position: Tensor, rank: Tensor | None = None, *, newer: int = 0, sinks: int = 0) -> Tensor:
    """Return (B, H) int64: the slot with `rank` (B, H) older entries; position (B, H, C) int64, -1 is empty.

    Without a rank, the slot with `newer` newer entries as in `selection.entry_before_newest`.
    """
    batch, heads, capacity = position.shape
    slot = torch.empty((batch, heads), dtype=torch.int64, device=position.device)
    block = min(triton.next_power_of_2(capacity), _MOST_IN_REGISTERS)
    find_rank[(batch * heads,)](
        position.contiguous(),
        slot if rank is None else rank.contiguous(),
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
