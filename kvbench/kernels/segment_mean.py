"""Merge a prompt's entries into their survivors, straight into the compact buffers.

One program makes one slot: it reads the entries of its bucket in their order and writes their float32
mean, so nothing the size of the prompt is copied to float32 and the result is the same every time
(adding by atomics is not). The reference is the plain branch of `kvbench.cache.slots.settle`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvbench.kernels.dispatch import on_its_device

_MEMBERS = 32


class Buckets(NamedTuple):
    """Who joins whom: members (B, H, T) entries sorted by survivor, slot c's from start to end (B, H, C).

    order (B, H, C): slot c's own entry; length (B, H): slots filled.
    """

    members: Tensor
    start: Tensor
    end: Tensor
    order: Tensor
    length: Tensor


def buckets_of(into: Tensor, held: Tensor, order: Tensor, length: Tensor) -> Buckets:
    """Return the buckets of `into` (B, H, T) int64, whom each entry joins, where held (B, H, T) bool."""
    bucket, members = torch.where(held, into, into.shape[-1]).sort(dim=-1, stable=True)
    order = order.contiguous()
    start, end = (torch.searchsorted(bucket, order, right=right) for right in (False, True))
    return Buckets(members=members, start=start, end=end, order=order, length=length.contiguous())


@on_its_device
def segment_mean(states: Tensor, buckets: Buckets, *, add_up: bool = False) -> Tensor:
    """Return (B, H, C, D) in the dtype of `states` (B, H, T, D): the mean of each slot's bucket, 0 in slots not filled.

    A survivor that nobody else joins stays as it is. add_up: the sum instead, of whoever joins.
    """
    states = states if states.stride(-1) == 1 else states.contiguous()
    batch, heads, entries, width = states.shape
    capacity = buckets.order.shape[-1]
    merged = torch.empty((batch, heads, capacity, width), dtype=states.dtype, device=states.device)
    _segment_mean[(capacity, batch * heads)](
        states,
        *buckets,
        merged,
        *states.stride()[:3],
        heads,
        entries,
        capacity,
        ADD_UP=add_up,
        WIDTH=width,
        BLOCK_D=int(triton.next_power_of_2(width)),
        MEMBERS=_MEMBERS,
        num_warps=1 if width == 1 else 4,
    )
    return merged


@triton.jit(do_not_specialize=["entries", "capacity"])
def _segment_mean(
    states,
    members,
    start,
    end,
    order,
    length,
    merged,
    states_b,
    states_h,
    states_t,
    heads,
    entries,
    capacity,
    ADD_UP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MEMBERS: tl.constexpr,
):
    slot, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    in_d, in_m = tl.arange(0, BLOCK_D), tl.arange(0, MEMBERS)
    source = states + (row // heads) * states_b + (row % heads) * states_h
    at = row * capacity + slot
    filled = slot < tl.load(length + row)
    first, last = tl.load(start + at), tl.load(end + at)
    last = tl.where(filled, last, first)
    summed = tl.zeros((MEMBERS, BLOCK_D), dtype=tl.float32)
    for step in range(0, tl.cdiv(last - first, MEMBERS)):
        rank = first + step * MEMBERS + in_m
        joins = rank < last
        entry = tl.load(members + row * entries + rank, mask=joins, other=0)
        tile_mask = joins[:, None] & (in_d < WIDTH)[None, :]
        summed += tl.load(source + entry[:, None] * states_t + in_d[None, :], mask=tile_mask, other=0.0).to(tl.float32)
    result = tl.sum(summed, axis=0)
    if not ADD_UP:
        own = tl.load(order + at) * states_t + in_d
        itself = tl.load(source + own, mask=in_d < WIDTH, other=0.0).to(tl.float32)
        count = (last - first).to(tl.float32)
        result = tl.where(count > 1, result / tl.maximum(count, 1.0), itself)
        result = tl.where(filled, result, 0.0)
    tl.store(merged + at * WIDTH + in_d, result.to(merged.dtype.element_ty), mask=in_d < WIDTH)
