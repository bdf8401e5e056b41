"""Merge a prompt's entries into their survivors, straight into the compact buffers.

One program makes one slot: it reads the entries of its bucket in their order and writes their float32
mean, so nothing the size of the prompt is copied to float32 and the result is the same every time
(adding by atomics is not). The reference is `kvbench.cache.slots.merged_in_torch`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_MEMBERS = 32


def segment_mean(
    states: Tensor, mass: Tensor | None, *, into: Tensor, held: Tensor, order: Tensor, length: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Return states (B, H, C, D) and mass (B, H, C) of the survivors; slots beyond `length` are zero.

    states (B, H, T, D); mass (B, H, T) float32 or None; into (B, H, T) int64, whom each entry joins;
    held (B, H, T) bool, others join nobody; order (B, H, C), slot c's entry; length (B, H), slots filled.
    A survivor that nobody else joins stays as it is.
    """
    states = states if states.stride(-1) == 1 else states.contiguous()
    batch, heads, entries, width = states.shape
    capacity = order.shape[-1]
    bucket, members = torch.where(held, into, entries).sort(dim=-1, stable=True)
    start = torch.searchsorted(bucket, order.contiguous())
    end = torch.searchsorted(bucket, order.contiguous(), right=True)
    merged = torch.empty((batch, heads, capacity, width), dtype=states.dtype, device=states.device)
    total = None if mass is None else torch.empty((batch, heads, capacity), dtype=mass.dtype, device=mass.device)
    _segment_mean[(capacity, batch * heads)](
        states,
        *states.stride()[:3],
        mass if mass is None else mass.contiguous(),
        members,
        start,
        end,
        order.contiguous(),
        length.contiguous(),
        merged,
        total,
        heads,
        entries,
        capacity,
        WITH_MASS=mass is not None,
        WIDTH=width,
        BLOCK_D=int(triton.next_power_of_2(width)),
        MEMBERS=_MEMBERS,
        num_warps=4,
    )
    return merged, total


@triton.jit(do_not_specialize=["entries", "capacity"])
def _segment_mean(
    states,
    states_b,
    states_h,
    states_t,
    mass,
    members,
    start,
    end,
    order,
    length,
    merged,
    total,
    heads,
    entries,
    capacity,
    WITH_MASS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MEMBERS: tl.constexpr,
):
    slot, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    in_d, in_m = tl.arange(0, BLOCK_D), tl.arange(0, MEMBERS)
    source = states + (row // heads) * states_b + (row % heads) * states_h
    at = row * capacity + slot
    filled = slot < tl.load(length + row)
    own = tl.load(order + at)
    first, last = tl.load(start + at), tl.load(end + at)
    last = tl.where(filled, last, first)
    summed = tl.zeros((MEMBERS, BLOCK_D), dtype=tl.float32)
    received = tl.zeros((MEMBERS,), dtype=tl.float32)
    for step in range(0, tl.cdiv(last - first, MEMBERS)):
        rank = first + step * MEMBERS + in_m
        joins = rank < last
        entry = tl.load(members + row * entries + rank, mask=joins, other=0)
        tile_mask = joins[:, None] & (in_d < WIDTH)[None, :]
        summed += tl.load(source + entry[:, None] * states_t + in_d[None, :], mask=tile_mask, other=0.0).to(tl.float32)
        if WITH_MASS:
            received += tl.load(mass + row * entries + entry, mask=joins, other=0.0)
    itself = tl.load(source + own * states_t + in_d, mask=(in_d < WIDTH) & filled, other=0.0).to(tl.float32)
    count = (last - first).to(tl.float32)
    result = tl.where(count > 1, tl.sum(summed, axis=0) / tl.maximum(count, 1.0), itself)
    tl.store(merged + at * WIDTH + in_d, result.to(merged.dtype.element_ty), mask=in_d < WIDTH)
    if WITH_MASS:
        tl.store(total + at, tl.sum(received, axis=0))
