"""A prompt that settles: who comes into which slot, who joins whom, and their means, straight into compact buffers.

One program takes a row and head to say who comes and who joins, and a few slots to join them. It reads the entries of
their buckets in their order and writes their float32 mean, so nothing the size of the prompt is copied to float32 and
the result is the same every time (adding by atomics is not). Where attention leans on first tokens, the last anchor
takes in most of a prompt, and one program would read that alone while all others are done: so chunks of entries that
all join the same one are added up by programs of their own first. The references are the plain branches in
`kvbench.cache.slots`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvbench.kernels.dispatch import in_line, on_its_device
from kvbench.kernels.ordering import bytes_of, line_up, walk_along

# mypy: ignore-errors
# Kernels are written in Triton's language, not Python's.

_MANY_NUMBERS = {"SLOTS": 4, "MEMBERS": 8, "num_warps": 4}  # of a slot, as in keys and values
_FEW_NUMBERS = {"SLOTS": 32, "MEMBERS": 8, "num_warps": 1}
_CHUNK = 64  # members whose sum is one program's


@triton.jit(do_not_specialize=["entries", "capacity"])
def _compact(
    keep,
    position,
    kind,
    mass,
    noted,
    line,
    order,
    length,
    kept_position,
    kept_kind,
    kept_mass,
    kept_noted,
    position_b,
    position_h,
    kind_b,
    kind_h,
    heads,
    entries,
    capacity,
    HAS_KEEP: tl.constexpr,
    HAS_MASS: tl.constexpr,
    HAS_NOTED: tl.constexpr,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
):
    """One program takes what stays of one row and head into its first slots, by age."""
    row = tl.program_id(0).to(tl.int64)
    position += row // heads * position_b + row % heads * position_h
    kind += row // heads * kind_b + row % heads * kind_h
    line += row * 2 * entries
    if HAS_KEEP:
        begin, held = line_up(position, keep + row * entries, line, entries, 1, BLOCK, PART)
    else:
        begin, held = line_up(position, position, line, entries, 0, BLOCK, PART)
    tl.store(length + row, held.to(tl.int64))
    for first in range(0, capacity, BLOCK):
        slot = first + tl.arange(0, BLOCK)
        inside, filled = slot < capacity, (slot < capacity) & (slot < held)
        own = tl.load(line + begin + slot, mask=inside & (slot < entries), other=0)
        at = row * capacity + slot
        tl.store(order + at, own.to(tl.int64), mask=inside)
        tl.store(kept_position + at, tl.load(position + own, mask=filled, other=-1), mask=inside)
        tl.store(kept_kind + at, tl.load(kind + own, mask=filled, other=0), mask=inside)
        if HAS_MASS:
            tl.store(kept_mass + at, tl.load(mass + row * entries + own, mask=filled, other=0.0), mask=inside)
        if HAS_NOTED:
            tl.store(kept_noted + at, tl.load(noted + row * entries + own, mask=filled, other=0.0), mask=inside)


@on_its_device
def compacted(
    position: Tensor, kind: Tensor, mass: Tensor | None, noted: Tensor | None, keep: Tensor | None, capacity: int
) -> tuple[Tensor, Tensor, dict[str, Tensor | None]]:
    """Return by age, in C = `capacity` slots, the tokens held that `keep` (B, H, T) bool leaves, None for all.

    order (B, H, C) int64, which entry comes into a slot (any where none does); length (B, H) int64, slots filled; the
    columns (B, H, C) by name, position -1 and the rest 0 in slots that none comes into. The given ones are (B, H, T).
    """
    batch, heads, entries = position.shape
    position = in_line(position)
    kind = in_line(kind)
    given = {"mass": mass, "noted": noted}
    optional = {name: position if one is None else one.contiguous() for name, one in given.items()}
    order = torch.empty((batch, heads, capacity), dtype=torch.int64, device=position.device)
    length = torch.empty((batch, heads), dtype=torch.int64, device=position.device)
    columns = {"position": torch.empty_like(order), "kind": torch.empty_like(order, dtype=kind.dtype)}
    columns |= {name: torch.empty_like(order, dtype=one.dtype) for name, one in given.items() if one is not None}
    _compact[(batch * heads,)](
        position if keep is None else bytes_of(keep),
        position,
        kind,
        optional["mass"],
        optional["noted"],
        torch.empty((batch, heads, 2 * entries), dtype=torch.int32, device=position.device),
        order,
        length,
        columns["position"],
        columns["kind"],
        columns.get("mass", order),
        columns.get("noted", order),
        *position.stride()[:2],
        *kind.stride()[:2],
        heads,
        entries,
        capacity,
        HAS_KEEP=keep is not None,
        HAS_MASS=mass is not None,
        HAS_NOTED=noted is not None,
        **walk_along(entries),
    )
    return order, length, {"mass": None, "noted": None, **columns}


@triton.jit(do_not_specialize=["entries", "capacity", "chunks"])
def _bucket(
    into,
    position,
    order,
    line,
    bounds,
    members,
    start,
    end,
    in_one,
    position_b,
    position_h,
    heads,
    entries,
    capacity,
    chunks,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
):
    """One program puts together who joins whom in one row and head, in the order of storage."""
    row = tl.program_id(0).to(tl.int64)
    position += row // heads * position_b + row % heads * position_h
    into += row * entries
    members += row * entries
    line += row * 2 * entries
    start_of = bounds + row * 2 * entries
    end_of = start_of + entries
    number = tl.arange(0, BLOCK)
    for first in range(0, entries, BLOCK):
        tl.store(start_of + first + number, 0, mask=first + number < entries)
        tl.store(end_of + first + number, 0, mask=first + number < entries)
    begin, held = line_up(into, position, line, entries, 0, BLOCK, PART)  # it waits for all to be written
    line += begin
    for first in range(0, held, BLOCK):
        rank = first + number
        inside, follows, goes_on = rank < held, (rank > 0) & (rank < held), rank < held - 1
        entry = tl.load(line + rank, mask=inside, other=0)
        tl.store(members + rank, entry, mask=inside)
        joins = tl.load(into + entry, mask=inside, other=-1)
        before = tl.load(into + tl.load(line + rank - 1, mask=follows, other=0), mask=follows, other=-1)
        after = tl.load(into + tl.load(line + rank + 1, mask=goes_on, other=0), mask=goes_on, other=-1)
        tl.store(start_of + joins, rank, mask=inside & (joins != before))
        tl.store(end_of + joins, rank + 1, mask=inside & (joins != after))
    for first in range(0, chunks, BLOCK):
        chunk = first + number
        begins, inside = chunk * CHUNK, (chunk < chunks) & ((chunk + 1) * CHUNK <= held)
        one = tl.load(into + tl.load(line + begins, mask=inside, other=0), mask=inside, other=-1)
        other = tl.load(into + tl.load(line + begins + CHUNK - 1, mask=inside, other=0), mask=inside, other=-2)
        tl.store(in_one + row * chunks + chunk, (one == other).to(tl.uint8), mask=chunk < chunks)
    tl.debug_barrier()
    for first in range(0, capacity, BLOCK):
        slot = first + number
        own = tl.load(order + row * capacity + slot, mask=slot < capacity, other=0)
        at = row * capacity + slot
        tl.store(start + at, tl.load(start_of + own, mask=slot < capacity, other=0), mask=slot < capacity)
        tl.store(end + at, tl.load(end_of + own, mask=slot < capacity, other=0), mask=slot < capacity)


class Buckets(NamedTuple):
    """Who joins whom: members (B, H, T) int32, entries by survivor; slot c's from start to end (B, H, C) int32.

    order (B, H, C): slot c's own entry; length (B, H): slots filled; in_one (B, H, N): whether the members of a chunk
    all join the same one.
    """

    members: Tensor
    start: Tensor
    end: Tensor
    order: Tensor
    length: Tensor
    in_one: Tensor


@on_its_device
def buckets_of(into: Tensor, position: Tensor, order: Tensor, length: Tensor) -> Buckets:
    """Return the buckets of `into` (B, H, T) int64, whom each entry joins; position (B, H, T), -1 joins nobody."""
    (batch, heads, entries), capacity = into.shape, order.shape[-1]
    position = in_line(position)
    columns, slots = (batch, heads, entries), (batch, heads, capacity)
    lines = torch.empty((5, *columns), dtype=torch.int32, device=into.device)  # two of a line, two of bounds, members
    start, end = torch.empty((2, *slots), dtype=torch.int32, device=into.device)
    chunks, order = max(1, entries // _CHUNK), order.contiguous()
    in_one = torch.empty((batch, heads, chunks), dtype=torch.uint8, device=into.device)
    _bucket[(batch * heads,)](
        into.contiguous(),
        position,
        order,
        lines[:2],
        lines[2:4],
        lines[4],
        start,
        end,
        in_one,
        *position.stride()[:2],
        heads,
        entries,
        capacity,
        chunks,
        CHUNK=_CHUNK,
        **walk_along(entries),
    )
    return Buckets(members=lines[4], start=start, end=end, order=order, length=length.contiguous(), in_one=in_one)


@on_its_device
def segment_mean(states: Tensor, buckets: Buckets, *, add_up: bool = False) -> Tensor:
    """Return (B, H, C, D) in the dtype of `states` (B, H, T, D): the mean of each slot's bucket, 0 in slots not filled.

    A survivor that nobody else joins stays as it is. add_up: the sum instead, of whoever joins.
    """
    states = in_line(states)
    batch, heads, entries, width = states.shape
    capacity, chunks = buckets.order.shape[-1], buckets.in_one.shape[-1]
    merged = torch.empty((batch, heads, capacity, width), dtype=states.dtype, device=states.device)
    sums = torch.empty((batch, heads, chunks, width), dtype=torch.float32, device=states.device)
    tile, block = _FEW_NUMBERS if width == 1 else _MANY_NUMBERS, int(triton.next_power_of_2(width))
    rows = {"WIDTH": width, "BLOCK_D": block, "CHUNK": _CHUNK}
    _chunk_sum[(chunks, batch * heads)](
        states, buckets.members, buckets.in_one, sums, *states.stride()[:3], heads, entries, chunks, **rows, num_warps=4
    )
    _segment_mean[(triton.cdiv(capacity, tile["SLOTS"]), batch * heads)](
        states,
        *buckets[:5],
        sums,
        merged,
        *states.stride()[:3],
        heads,
        entries,
        capacity,
        chunks,
        ADD_UP=add_up,
        **rows,
        **tile,
    )
    return merged


@triton.jit(do_not_specialize=["entries", "chunks"])
def _chunk_sum(
    states,
    members,
    in_one,
    sums,
    states_b,
    states_h,
    states_t,
    heads,
    entries,
    chunks,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Add up a chunk of members, if all of them join the same slot."""
    row, chunk = tl.program_id(1).to(tl.int64), tl.program_id(0)
    if tl.load(in_one + row * chunks + chunk) > 0:
        in_d = tl.arange(0, BLOCK_D)
        entry = tl.load(members + row * entries + chunk * CHUNK + tl.arange(0, CHUNK)).to(tl.int64)
        source = states + (row // heads) * states_b + (row % heads) * states_h
        tile = tl.load(source + entry[:, None] * states_t + in_d[None, :], mask=(in_d < WIDTH)[None, :], other=0.0)
        summed = tl.sum(tile.to(tl.float32), axis=0)
        tl.store(sums + (row * chunks + chunk) * WIDTH + in_d, summed, mask=in_d < WIDTH)


@triton.jit(do_not_specialize=["entries", "capacity", "chunks"])
def _segment_mean(
    states,
    members,
    start,
    end,
    order,
    length,
    sums,
    merged,
    states_b,
    states_h,
    states_t,
    heads,
    entries,
    capacity,
    chunks,
    ADD_UP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
    SLOTS: tl.constexpr,
    MEMBERS: tl.constexpr,
):
    """Join the buckets of some slots of one row and head, so many members of each at a time, or sums of chunks."""
    row = tl.program_id(1).to(tl.int64)
    slot = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    in_d, in_m = tl.arange(0, BLOCK_D), tl.arange(0, MEMBERS)
    in_width = in_d < WIDTH
    source = states + (row // heads) * states_b + (row % heads) * states_h
    at, inside = row * capacity + slot, slot < capacity
    filled = inside & (slot < tl.load(length + row))
    first = tl.load(start + at, mask=filled, other=0)
    last = tl.load(end + at, mask=filled, other=0)
    chunk, after = tl.cdiv(first, CHUNK), last // CHUNK
    has_chunks = after > chunk
    leading = tl.where(has_chunks, chunk * CHUNK, last) - first
    single = leading + tl.where(has_chunks, last - after * CHUNK, 0)
    behind = tl.where(has_chunks, after * CHUNK, last) - leading
    summed = tl.zeros((SLOTS, MEMBERS, BLOCK_D), dtype=tl.float32)
    for step in range(0, tl.cdiv(tl.max(single, 0), MEMBERS)):
        number = step * MEMBERS + in_m[None, :]
        joins = number < single[:, None]
        rank = number + tl.where(number < leading[:, None], first[:, None], behind[:, None])
        entry = tl.load(members + row * entries + rank, mask=joins, other=0).to(tl.int64)
        tile_at = source + entry[:, :, None] * states_t + in_d[None, None, :]
        summed += tl.load(tile_at, mask=joins[:, :, None] & in_width[None, None, :], other=0.0).to(tl.float32)
    for step in range(0, tl.cdiv(tl.max(after - chunk, 0), MEMBERS)):
        number = chunk[:, None] + step * MEMBERS + in_m[None, :]
        tile_at = sums + (row * chunks + number)[:, :, None] * WIDTH + in_d[None, None, :]
        joins = (number < after[:, None])[:, :, None] & in_width[None, None, :]
        summed += tl.load(tile_at, mask=joins, other=0.0)
    result = tl.sum(summed, axis=1)
    wide = inside[:, None] & in_width[None, :]
    if not ADD_UP:
        own = tl.load(order + at, mask=inside, other=0)[:, None] * states_t + in_d[None, :]
        itself = tl.load(source + own, mask=wide, other=0.0).to(tl.float32)
        count = (last - first).to(tl.float32)[:, None]
        result = tl.where(count > 1, result / tl.maximum(count, 1.0), itself)
        result = tl.where(filled[:, None], result, 0.0)
    tl.store(merged + at[:, None] * WIDTH + in_d[None, :], result.to(merged.dtype.element_ty), mask=wide)
