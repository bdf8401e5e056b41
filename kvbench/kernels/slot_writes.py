"""What is written into slots while tokens are generated: the new one, freed victims; a launch each, nothing waits.

A program takes one (row, KV head), whose slots begin after those of the ones before it, in a ragged buffer
where its start says. `rank` is kept only where positions count inside the cache: the new token is the
youngest, and freeing a victim moves everyone younger than it one place down. The entry with a given number
of older ones is found without sorting, by halving the range of positions; slots that fit into one block are
read once and stay in registers meanwhile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvbench.kernels.decode_step import turned_halves
from kvbench.kernels.dispatch import SlotColumns, Unturned, in_line, on_its_device

# mypy: ignore-errors
# Kernels are written in Triton's language, not Python's.


@triton.jit(do_not_specialize=["capacity", "pairs"])
def write_token(
    new_keys,
    new_values,
    queries,
    cosines,
    sines,
    turned,
    keys,
    values,
    position,
    kind,
    mass,
    rank,
    length,
    free,
    seen,
    head_start,
    pairs,
    heads,
    query_heads,
    capacity,
    width,
    key_row,
    key_head,
    value_row,
    value_head,
    query_row,
    query_head,
    table_row,
    BLOCK_D: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    HAS_MASS: tl.constexpr,
    HAS_RANK: tl.constexpr,
    ADVANCE: tl.constexpr,
    RAGGED: tl.constexpr,
    TURN: tl.constexpr,
):
    """Put one token (row, head, D) at position seen - 1 into slot `free`; with ADVANCE the next slot is free.

    With TURN keys are rotated on the way, and the programs after the last pair's rotate a head of `queries` each, into
    `turned` (row, head, D).
    """
    pair = tl.program_id(0)
    if TURN:
        half = width // 2
        h = tl.arange(0, BLOCK_HALF)
    if pair >= pairs:
        if TURN:
            pair -= pairs
            row, head = pair // query_heads, pair % query_heads
            at = row * query_row + head * query_head
            low, high = turned_halves(queries, at, cosines, sines, row * table_row, half, h)
            to = turned + pair * width + h
            tl.store(to, low.to(turned.dtype.element_ty), mask=h < half)
            tl.store(to + half, high.to(turned.dtype.element_ty), mask=h < half)
    else:
        row, head = pair // heads, pair % heads
        d = tl.arange(0, BLOCK_D)
        slot = tl.load(free + pair)
        held = tl.load(length + pair)
        entry = (tl.load(head_start + pair) if RAGGED else pair.to(tl.int64) * capacity) + slot
        at = row * key_row + head * key_head
        if TURN:
            low, high = turned_halves(new_keys, at, cosines, sines, row * table_row, half, h)
            to = keys + entry * width + h
            tl.store(to, low.to(keys.dtype.element_ty), mask=h < half)
            tl.store(to + half, high.to(keys.dtype.element_ty), mask=h < half)
        else:
            k = tl.load(new_keys + at + d, mask=d < width)
            tl.store(keys + entry * width + d, k, mask=d < width)
        v = tl.load(new_values + row * value_row + head * value_head + d, mask=d < width)
        tl.store(values + entry * width + d, v, mask=d < width)
        tl.store(position + entry, tl.load(seen + row) - 1)
        tl.store(kind + entry, 0)
        if HAS_MASS:
            tl.store(mass + entry, 0.0)
        if HAS_RANK:
            tl.store(rank + entry, held)
        tl.store(length + pair, held + 1)
        if ADVANCE:
            tl.store(free + pair, held + 1)


@triton.jit(do_not_specialize=["capacity", "score_row", "score_head"])
def free_victim(
    score,
    victim,
    position,
    rank,
    in_place,
    length,
    free,
    faults,
    budget,
    sinks,
    recent_from,
    head_start,
    spread,
    heads,
    capacity,
    score_row,
    score_head,
    BLOCK_C: tl.constexpr,
    GIVEN: tl.constexpr,
    HAS_RANK: tl.constexpr,
    APPLY: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """Free a slot of each pair that is over its budget: `victim`, or the lowest score, the oldest of equals.

    Without APPLY every pair's choice is written to `victim` and nothing else changes.

    With HAS_RANK entries younger than the one that goes move one place down, and `in_place` (pair,) becomes how many
    first slots hold entries in their places, if all others lie before theirs by as much as the next query, else -1.

    Sinks (position < sinks) and the recent window (position >= recent_from) count as infinite scores. What is no
    choice is noted in `faults` (pair,), as kvbench.cache.slots names it: 1 for NaN among the other scores, which
    -1 says of a given victim, 2 for a given victim that is no slot with a token.
    """
    pair = tl.program_id(0)
    row, head = pair // heads, pair % heads
    held_tokens = tl.load(length + pair)
    held = held_tokens.to(tl.int32)
    if RAGGED:
        allowed = tl.load(budget + row) + tl.load(spread + pair)
        base = tl.load(head_start + pair)
    else:
        allowed = tl.load(budget + row)
        base = pair.to(tl.int64) * capacity
    over = (held > allowed) | (not APPLY)
    c = tl.arange(0, BLOCK_C)
    chosen = held_tokens * 0
    if over:
        fault = held * 0
        if GIVEN:
            chosen = tl.load(victim + pair)
            wrong = (chosen < 0) | (chosen >= held)
            fault = tl.where(wrong, tl.where(chosen == -1, 1, 2), fault)
            chosen = tl.where(wrong, 0, chosen)
            if HAS_RANK:  # several warps: all have read the length before one writes it
                tl.debug_barrier()
        else:
            first_sinks = tl.load(sinks + row)
            recent = tl.load(recent_from + row)
            lowest = tl.full((BLOCK_C,), float("inf"), tl.float32)
            oldest = tl.full((BLOCK_C,), 2147483647, tl.int32)
            place = tl.zeros((BLOCK_C,), tl.int32)
            unknown = tl.zeros((BLOCK_C,), tl.int32)
            for start in range(0, held, BLOCK_C):
                slot = start + c
                p = tl.load(position + base + slot, mask=slot < held, other=-1).to(tl.int32)
                s = tl.load(score + row * score_row + head * score_head + slot, mask=slot < held, other=0.0)
                s = s.to(tl.float32)
                kept = (p < first_sinks) | (p >= recent)
                unknown |= ((s != s) & (kept == 0)).to(tl.int32)
                s = tl.where(kept, float("inf"), tl.minimum(s, 3.4028234663852886e38))
                better = (p >= 0) & ((s < lowest) | ((s == lowest) & (p < oldest)))
                lowest = tl.where(better, s, lowest)
                oldest = tl.where(better, p, oldest)
                place = tl.where(better, slot, place)
            least = tl.min(lowest, 0)
            oldest = tl.where(lowest == least, oldest, 2147483647)
            age = tl.min(oldest, 0)
            chosen = tl.min(tl.where(oldest == age, place, 2147483647), 0).to(tl.int64)
            fault = tl.max(unknown, 0)
        if not APPLY:
            tl.store(victim + pair, chosen)
        elif HAS_RANK:
            gone = tl.load(rank + base + chosen)
            newest = tl.load(position + base + tl.load(free + pair))  # written in this step
            query_behind = (newest + 2 - held_tokens).to(tl.int32)  # of the next token, which will see one more
            apart = tl.zeros((BLOCK_C,), tl.int32)
            last_apart = tl.full((BLOCK_C,), -1, tl.int32)
            astray = tl.zeros((BLOCK_C,), tl.int32)
            for start in range(0, held, BLOCK_C):
                slot = start + c
                r = tl.load(rank + base + slot, mask=slot < held, other=0)
                p = tl.load(position + base + slot, mask=slot < held, other=0).to(tl.int32)
                r -= (r > gone).to(r.dtype)
                tl.store(rank + base + slot, r, mask=slot < held)
                is_apart = (slot < held) & (slot != chosen) & (p - r != query_behind)
                apart += is_apart.to(tl.int32)
                last_apart = tl.where(is_apart, slot, last_apart)
                astray |= (is_apart & (p != r)).to(tl.int32)
            num_apart = tl.sum(apart, 0)
            are_first = tl.max(last_apart, 0) + 1 == num_apart
            tl.store(in_place + pair, tl.where((tl.max(astray, 0) == 0) & are_first, num_apart, -1))
        if APPLY:
            if fault > 0:
                tl.store(faults + pair, tl.load(faults + pair) | fault)
            tl.store(position + base + chosen, -1)
            tl.store(length + pair, held_tokens - 1)
            tl.store(free + pair, chosen)
    else:
        tl.store(free + pair, held_tokens)


_MOST_SLOTS = 2048  # a block reads so many at once, measured on an H200 (docs/log.md)


@on_its_device
def write_slot(
    columns: SlotColumns, keys: Tensor, values: Tensor, seen: Tensor, *, advance: bool, unturned: Unturned | None = None
) -> None:
    """Put one token, (B, H, 1, D), at position `seen` - 1 into the free slots; `advance` frees the next slot.

    unturned: what is still to be done to `keys`, and to the queries beside them.
    """
    (batch, heads), width = columns.length.shape, columns.keys.shape[-1]
    pairs, query_heads = batch * heads, 0 if unturned is None else unturned.queries.shape[1]
    queries = keys if unturned is None else unturned.queries
    tables = (keys, keys) if unturned is None else (unturned.cosines, unturned.sines)
    write_token[(pairs + batch * query_heads,)](
        keys,
        values,
        queries,
        *tables,
        keys if unturned is None else unturned.turned_queries,
        columns.keys,
        columns.values,
        columns.position,
        columns.kind,
        columns.position if columns.mass is None else columns.mass,
        columns.position if columns.rank is None else columns.rank,
        columns.length,
        columns.free,
        seen,
        columns.length if columns.start is None else columns.start,
        pairs,
        heads,
        query_heads,
        columns.capacity,
        width,
        *keys.stride()[:2],
        *values.stride()[:2],
        *queries.stride()[:2],
        0 if unturned is None else unturned.table_row,
        BLOCK_D=triton.next_power_of_2(width),
        BLOCK_HALF=triton.next_power_of_2(width // 2),
        HAS_MASS=columns.mass is not None,
        HAS_RANK=columns.rank is not None,
        ADVANCE=advance,
        RAGGED=columns.start is not None,
        TURN=unturned is not None,
        num_warps=1,
    )


def free_lowest(columns: SlotColumns, score: Tensor, budget: Tensor, sinks: Tensor, recent_from: Tensor) -> None:
    """Free the entry of lowest `score` (B, 1 or H, C) of each head over its `budget` (B,), the oldest of equals.

    Entries at positions below `sinks` (B,) or from `recent_from` (B,) on are protected. NaN of another entry
    is noted in the faults and counts as a large score.
    """
    _free(columns, score, columns.free, budget, sinks, recent_from, given=False)


def lowest_slot(columns: SlotColumns, score: Tensor, budget: Tensor, sinks: Tensor, recent_from: Tensor) -> Tensor:
    """Return (B, H) int64: the slot that `free_lowest` would free were every head over its budget; frees nothing."""
    victim = torch.empty_like(columns.free)
    _free(columns, score, victim, budget, sinks, recent_from, given=False, apply=False)
    return victim


def free_given(columns: SlotColumns, victim: Tensor, budget: Tensor) -> None:
    """Free slot `victim` (B, H) int64 of each head over its `budget` (B,).

    One that is no slot with a token is noted in the faults, and slot 0 is freed.
    """
    _free(columns, columns.position, victim, budget, budget, budget, given=True)


@on_its_device
def _free(
    columns: SlotColumns,
    score: Tensor,
    victim: Tensor,
    budget: Tensor,
    sinks: Tensor,
    recent_from: Tensor,
    *,
    given: bool,
    apply: bool = True,
) -> None:
    (batch, heads), capacity = columns.length.shape, columns.capacity
    score = in_line(score)
    block = 512 if given and columns.rank is None else min(max(256, triton.next_power_of_2(capacity)), _MOST_SLOTS)
    free_victim[(batch * heads,)](
        score,
        victim,
        columns.position,
        columns.position if columns.rank is None else columns.rank,
        columns.faults if columns.in_place is None else columns.in_place,
        columns.length,
        columns.free,
        columns.faults,
        budget,
        sinks,
        recent_from,
        columns.length if columns.start is None else columns.start,
        columns.length if columns.spread is None else columns.spread,
        heads,
        capacity,
        score.stride(0) if score.ndim == 3 else 0,
        0 if score.ndim < 3 or score.shape[1] == 1 else score.stride(1),
        BLOCK_C=block,
        GIVEN=given,
        HAS_RANK=columns.rank is not None,
        APPLY=apply,
        RAGGED=columns.start is not None,
        num_warps=1 if given and columns.rank is None else block // 128,  # one warp waits for no other
    )


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
        guess = high - newer  # it lies there if all after it are held, which is how this very rule leaves them
        up_to = _count_to(base, only, guess, capacity, BLOCK_C, IN_ONE)
        is_held = up_to > _count_to(base, only, guess - 1, capacity, BLOCK_C, IN_ONE)
        is_there = (up_to == wanted) & is_held
        low = tl.where(is_there, guess, low)
        high = tl.where(is_there, guess, high)
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


_MOST_IN_REGISTERS = 8192
_ONE_WARP = 512


@on_its_device
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
        num_warps=1 if block <= _ONE_WARP else max(4, block // 512),
    )
    return slot
