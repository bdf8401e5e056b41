"""Which entries are best, and which are older, without sorting: one launch where plain torch takes twenty.

`keep_top` finds the score of the last entry that stays digit by digit, by counting how many have each (radix select),
and among equal scores its age the same way; then every entry knows by itself whether it stays. `age_rank` counts: where
entries lie in the order of their tokens, as after a prompt, those held before; where slots were used again, those that
are older. The references are the plain branches in `kvbench.cache.selection`.

The others walk along a row's entries in their order: a program takes one row and head, and lines its entries up first,
which is one walk where they lie in order, and a radix sort of four bits a time where they do not. So their time grows
as the row does. `nearest_anchor` goes to and fro; `kvbench.kernels.settling` has the walks that move entries.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvbench.kernels.dispatch import in_line, on_its_device

_BLOCK = 4096  # entries that one load of the search reads
_RANKED = 512  # entries that one program ranks, and reads at once
_SORTED = 512  # entries of which a digit is sorted at once


@triton.jit
def _entries_at(score, position, first, entries, BLOCK: tl.constexpr):
    """Return, as int32, scores in an order of their own (NaN is 0), positions, whether held, and whether NaN."""
    at = first + tl.arange(0, BLOCK)
    stands_at = tl.load(position + at, mask=at < entries, other=-1).to(tl.int32)
    number = tl.load(score + at, mask=at < entries, other=0.0).to(tl.float32)
    unknown = (number != number) & (stands_at >= 0)
    bits = tl.where((number == 0.0) | unknown, 0.0, number).to(tl.int32, bitcast=True)  # of two zeros none is larger
    return bits ^ ((bits >> 31) & 0x7FFFFFFF), stands_at, stands_at >= 0, unknown


@triton.jit
def _bound(score, position, entries, wanted, tied, BY_AGE: tl.constexpr, BLOCK: tl.constexpr):
    """Return the `wanted`-th largest key, how many that have it are wanted, and how many have it.

    Keys are scores, or BY_AGE the positions of those whose score is `tied`; the least there is where fewer are held.
    """
    bins = tl.arange(0, 256)
    bound = wanted * 0
    left = wanted
    having = wanted
    for digit in tl.static_range(4):
        counts = tl.zeros((256,), dtype=tl.int32)
        for first in range(0, entries, BLOCK):
            key, stands_at, held, _ = _entries_at(score, position, first, entries, BLOCK)
            if BY_AGE:
                held = held & (key == tied)
                key = stands_at
            value = key >> (24 - 8 * digit)
            if digit == 0:
                value = value + 128
            else:
                held = held & ((value >> 8) == bound)
                value = value & 255
            counts += tl.histogram(value, 256, mask=held)
        larger = tl.sum(counts, axis=0) - tl.cumsum(counts, axis=0)
        found = tl.minimum(tl.sum((larger >= left).to(tl.int32), axis=0), 255)
        left -= tl.sum(tl.where(bins == found, larger, 0), axis=0)
        having = tl.sum(tl.where(bins == found, counts, 0), axis=0)
        bound = found - 128 if digit == 0 else bound * 256 + found
    return bound, left, having


@triton.jit(do_not_specialize=["entries"])
def _keep_top(
    score, position, budget, keep, position_b, position_h, budget_b, budget_h, heads, entries, BLOCK: tl.constexpr
):
    """One program chooses in one row and head."""
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // heads, row % heads
    score += row * entries
    keep += row * entries
    position += batch * position_b + head * position_h
    wanted = tl.load(budget + batch * budget_b + head * budget_h).to(tl.int32)
    bound, left, having = _bound(score, position, entries, wanted, wanted, False, BLOCK)
    oldest = wanted * 0
    if left < having:
        oldest, left, having = _bound(score, position, entries, left, bound, True, BLOCK)
        oldest += (left < having).to(tl.int32)  # none of the equals is wanted
    num_unknown = wanted * 0
    for first in range(0, entries, BLOCK):
        _, _, _, unknown = _entries_at(score, position, first, entries, BLOCK)
        num_unknown += tl.sum(unknown.to(tl.int32), axis=0)
    for first in range(0, entries, BLOCK):
        key, stands_at, held, _ = _entries_at(score, position, first, entries, BLOCK)
        stays = held & ((key > bound) | ((key == bound) & (stands_at >= oldest))) & (num_unknown == 0)
        at = first + tl.arange(0, BLOCK)
        tl.store(keep + at, stays.to(tl.uint8), mask=at < entries)


@triton.jit
def _larger(one, other):
    return tl.maximum(one, other)


@triton.jit(do_not_specialize=["entries"])
def _age_rank(position, made, position_b, position_h, heads, entries, ORDER: tl.constexpr, BLOCK: tl.constexpr):
    """One program ranks a block of entries of one row and head; ORDER: it writes who has each rank instead."""
    row = tl.program_id(1).to(tl.int64)
    position += row // heads * position_b + row % heads * position_h
    made += row * entries
    mine_from = tl.program_id(0) * BLOCK
    number = tl.arange(0, BLOCK)
    at = mine_from + number
    mine = tl.load(position + at, mask=at < entries, other=-1).to(tl.int32)
    newest = mine_from * 0 - 1
    held, before, unordered = newest + 1, newest + 1, newest + 1
    for first in range(0, entries, BLOCK):
        there = tl.load(position + first + number, mask=first + number < entries, other=-1).to(tl.int32)
        so_far = tl.maximum(tl.associative_scan(there, 0, _larger), newest)
        unordered += tl.sum(((there >= 0) & (there < so_far)).to(tl.int32), axis=0)
        newest = tl.maximum(newest, tl.max(there, axis=0))
        num = tl.sum((there >= 0).to(tl.int32), axis=0)
        before += tl.where(first < mine_from, num, 0)
        held += num
    is_held = (mine >= 0).to(tl.int32)
    held_before = before + tl.cumsum(is_held, axis=0) - is_held
    rank = held_before
    if unordered > 0:
        rank = is_held * 0
        for first in range(0, entries, BLOCK):
            for part in range(0, BLOCK, 16):
                other_at = first + part + tl.arange(0, 16)
                other = tl.load(position + other_at, mask=other_at < entries, other=-1).to(tl.int32)
                older = (other[None, :] < mine[:, None]) | (
                    (other[None, :] == mine[:, None]) & (other_at[None, :] < at[:, None])
                )
                rank += tl.sum((older & (other >= 0)[None, :]).to(tl.int32), axis=1)
    rank = tl.where(mine >= 0, rank, held + at - held_before).to(tl.int64)
    if ORDER:
        tl.store(made + rank, at.to(tl.int64), mask=at < entries)
    else:
        tl.store(made + at, rank, mask=at < entries)


@on_its_device
def keep_top(score: Tensor, position: Tensor, budget: Tensor) -> Tensor:
    """Return (B, H, T) bool as `selection.keep_top` does; score (B, H, T) in up to 32 bits, budget (B, H) or (B, 1)."""
    batch, heads, entries = position.shape
    keep = torch.empty((batch, heads, entries), dtype=torch.uint8, device=position.device)
    position = in_line(position)
    block = min(max(16, int(triton.next_power_of_2(entries))), _BLOCK)
    _keep_top[(batch * heads,)](
        score.expand(position.shape).contiguous(),
        position,
        budget,
        keep,
        *position.stride()[:2],
        *budget.expand(batch, heads).stride(),
        heads,
        entries,
        BLOCK=block,
        num_warps=8 if block == _BLOCK else 4,
    )
    return keep.view(torch.bool)


def age_rank(position: Tensor) -> Tensor:
    """Return (B, H, T) int64 as `selection.age_rank` does."""
    return _ranked(position, order=False)


def oldest_first(position: Tensor) -> Tensor:
    """Return (B, H, T) int64 as `selection.oldest_first` does."""
    return _ranked(position, order=True)


@on_its_device
def _ranked(position: Tensor, *, order: bool) -> Tensor:
    batch, heads, entries = position.shape
    made = torch.empty((batch, heads, entries), dtype=torch.int64, device=position.device)
    position = in_line(position)
    block = min(max(16, int(triton.next_power_of_2(entries))), _RANKED)
    _age_rank[(triton.cdiv(entries, block), batch * heads)](
        position, made, *position.stride()[:2], heads, entries, ORDER=order, BLOCK=block, num_warps=4
    )
    return made


@triton.jit
def _smaller(one, other):
    return tl.minimum(one, other)


@triton.jit
def _key_at(key, shown, at, inside, LEAST: tl.constexpr):
    """Return the keys of entries as int32, -1 of those that are absent: where `shown` is below LEAST, or the key is."""
    number = tl.load(key + at, mask=inside, other=-1).to(tl.int32)
    return tl.where(tl.load(shown + at, mask=inside, other=0).to(tl.int32) >= LEAST, number, -1)


@triton.jit
def line_up(key, shown, line, entries, LEAST: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr):
    """Write the entries of one row into `line`, those present by key, of equals the first first, the absent behind.

    `line` is twice as long as the row. Returns where in it the line begins, and how many are present.
    """
    number = tl.arange(0, BLOCK)
    largest = tl.program_id(0) * 0 - 1
    present, unordered, before = largest + 1, largest + 1, largest + 1
    for first in range(0, entries, BLOCK):
        there = _key_at(key, shown, first + number, first + number < entries, LEAST)
        so_far = tl.maximum(tl.associative_scan(there, 0, _larger), largest)
        unordered += tl.sum(((there >= 0) & (there < so_far)).to(tl.int32), axis=0)
        largest = tl.maximum(largest, tl.max(there, axis=0))
        present += tl.sum((there >= 0).to(tl.int32), axis=0)
    for first in range(0, entries, BLOCK):
        at = first + number
        inside = at < entries
        is_present = (_key_at(key, shown, at, inside, LEAST) >= 0).to(tl.int32)
        present_before = before + tl.cumsum(is_present, axis=0) - is_present
        place = tl.where(is_present > 0, present_before, present + at - present_before)
        tl.store(line + place, at, mask=inside)
        tl.store(line + entries + place, at, mask=inside & (is_present == 0))
        before += tl.sum(is_present, axis=0)
    tl.debug_barrier()
    begin = present * 0
    if unordered > 0:
        digits, part = tl.arange(0, 16), tl.arange(0, PART)
        shift = present * 0
        while largest > 0:
            counts = tl.zeros((16,), dtype=tl.int32)
            for first in range(0, present, PART):
                at = first + part
                slot = tl.load(line + begin + at, mask=at < present, other=0)
                digit = (tl.load(key + slot, mask=at < present, other=0).to(tl.int32) >> shift) & 15
                is_digit = (digit[:, None] == digits[None, :]) & (at < present)[:, None]
                counts += tl.sum(is_digit.to(tl.int32), axis=0)
            place_of = tl.cumsum(counts, axis=0) - counts
            for first in range(0, present, PART):
                at = first + part
                slot = tl.load(line + begin + at, mask=at < present, other=0)
                digit = (tl.load(key + slot, mask=at < present, other=0).to(tl.int32) >> shift) & 15
                is_digit = ((digit[:, None] == digits[None, :]) & (at < present)[:, None]).to(tl.int32)
                place = tl.sum(is_digit * (place_of[None, :] + tl.cumsum(is_digit, axis=0) - 1), axis=1)
                tl.store(line + entries - begin + place, slot, mask=at < present)
                place_of += tl.sum(is_digit, axis=0)
            tl.debug_barrier()
            begin = entries - begin
            shift += 4
            largest = largest >> 4
    return begin, present


@triton.jit(do_not_specialize=["entries"])
def _nearest_anchor(
    anchor,
    member,
    position,
    line,
    nearest,
    position_b,
    position_h,
    heads,
    entries,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
):
    """One program looks for the anchors of one row and head: to the left from its start, to the right from its end."""
    row = tl.program_id(0).to(tl.int64)
    position += row // heads * position_b + row % heads * position_h
    anchor += row * entries
    member += row * entries
    nearest += row * entries
    line += row * 3 * entries
    earlier_of = line + 2 * entries
    number = tl.arange(0, BLOCK)
    begin, present = line_up(position, position, line, entries, 0, BLOCK, PART)
    line += begin
    last = present * 0 - 1
    for first in range(0, entries, BLOCK):
        rank = first + number
        slot = tl.load(line + rank, mask=rank < entries, other=0)
        is_anchor = tl.load(anchor + slot, mask=rank < entries, other=0) > 0
        earlier = tl.maximum(tl.associative_scan(tl.where(is_anchor, rank, -1), 0, _larger), last)
        tl.store(earlier_of + rank, earlier, mask=rank < entries)
        last = tl.max(earlier, axis=0)
    tl.debug_barrier()
    following = present * 0 + entries
    blocks = tl.cdiv(entries, BLOCK)
    for back in range(0, blocks):
        rank = (blocks - 1 - back) * BLOCK + number
        inside = rank < entries
        slot = tl.load(line + rank, mask=inside, other=0)
        is_anchor = tl.load(anchor + slot, mask=inside, other=0) > 0
        is_member = tl.load(member + slot, mask=inside, other=0) > 0
        earlier = tl.load(earlier_of + rank, mask=inside, other=-1)
        later = tl.associative_scan(tl.where(is_anchor, rank, entries), 0, _smaller, reverse=True)
        later = tl.minimum(later, following)
        to_earlier = (earlier >= 0) & ((later == entries) | (rank - earlier <= later - rank))
        found = tl.where(to_earlier, earlier, later)
        found = tl.where(is_member & (found < entries), found, rank)
        tl.store(nearest + slot, tl.load(line + found, mask=inside, other=0).to(tl.int64), mask=inside)
        following = tl.min(later, axis=0)


@triton.jit(do_not_specialize=["entries"])
def _look(
    keep,
    into,
    position,
    budget,
    counts,
    amiss,
    position_b,
    position_h,
    heads,
    entries,
    HAS_INTO: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program counts what a plan does in one row and head, and says what is wrong with it."""
    row = tl.program_id(0).to(tl.int64)
    position += row // heads * position_b + row % heads * position_h
    keep += row * entries
    into += row * entries
    number = tl.arange(0, BLOCK)
    kept = tl.program_id(0) * 0
    held, empty, lost = kept, kept, kept
    least = tl.load(into) if HAS_INTO else kept.to(tl.int64)
    most = least
    for first in range(0, entries, BLOCK):
        at = first + number
        inside = at < entries
        is_kept = tl.load(keep + at, mask=inside, other=0) > 0
        is_held = tl.load(position + at, mask=inside, other=-1) >= 0
        kept += tl.sum(is_kept.to(tl.int32), axis=0)
        held += tl.sum(is_held.to(tl.int32), axis=0)
        empty += tl.sum((is_kept & (is_held == 0)).to(tl.int32), axis=0)
        if HAS_INTO:
            joins = tl.load(into + at, mask=inside, other=0)
            least = tl.minimum(least, tl.min(tl.where(inside, joins, least), axis=0))
            most = tl.maximum(most, tl.max(tl.where(inside, joins, most), axis=0))
            survivor = tl.minimum(tl.maximum(joins, 0), entries - 1)
            stays = tl.load(keep + survivor, mask=inside, other=0) > 0
            lost += tl.sum((inside & (stays == 0) & (joins != at)).to(tl.int32), axis=0)
    allowed = tl.load(budget + row // heads)
    miscounted = (kept > allowed) | ((held > 0) & (kept < 1))
    if EXACT:
        miscounted = miscounted | (kept != tl.minimum(held.to(tl.int64), allowed))
    tl.store(counts + row * 4, kept.to(tl.int64))
    tl.store(counts + row * 4 + 1, held.to(tl.int64))
    tl.store(counts + row * 4 + 2, least)
    tl.store(counts + row * 4 + 3, most)
    tl.store(amiss + row * 4, (empty > 0).to(tl.uint8))
    tl.store(amiss + row * 4 + 1, miscounted.to(tl.uint8))
    tl.store(amiss + row * 4 + 2, ((least < 0) | (most >= entries)).to(tl.uint8))
    tl.store(amiss + row * 4 + 3, (lost > 0).to(tl.uint8))


@triton.jit
def _is_outside(there, first, last, batch):
    """Whether entries at positions `there` are held, and below `first` or from `last` on, of one row's bounds."""
    return (there >= 0) & ((there < tl.load(first + batch)) | (there >= tl.load(last + batch)))


@triton.jit(do_not_specialize=["entries"])
def _shield(
    score,
    position,
    first,
    last,
    shielded,
    position_b,
    position_h,
    score_b,
    score_h,
    heads,
    entries,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // heads, row % heads
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = tl.load(position + batch * position_b + head * position_h + at, mask=at < entries, other=-1)
    number = tl.load(score + batch * score_b + head * score_h + at, mask=at < entries, other=0.0).to(tl.float32)
    number = tl.where(number > 3.4028234663852886e38, 3.4028234663852886e38, number)  # NaN stays
    number = tl.where(_is_outside(there, first, last, batch), float("inf"), number)
    tl.store(shielded + row * entries + at, number, mask=at < entries)


@triton.jit(do_not_specialize=["entries", "each"])
def _has_nan(numbers, position, found, position_b, position_h, heads, entries, each, BLOCK: tl.constexpr):
    """One program looks at some entries of one row and head, of which there are so many numbers `each`."""
    row, block = tl.program_id(1).to(tl.int64), tl.program_id(0)
    at = block * BLOCK + tl.arange(0, BLOCK)
    position += row // heads * position_b + row % heads * position_h
    is_held = tl.load(position + at, mask=at < entries, other=-1) >= 0
    unknown = tl.zeros((BLOCK,), dtype=tl.int32)
    for one in range(0, each):
        number = tl.load(numbers + (row * each + one) * entries + at, mask=at < entries, other=0.0).to(tl.float32)
        unknown |= ((number != number) & is_held).to(tl.int32)
    tl.store(found + row * tl.num_programs(0) + block, tl.max(unknown, axis=0).to(tl.uint8))


@triton.jit(do_not_specialize=["rows", "num_sinks", "num_recent"])
def _range(seen, budget, sinks, recent_from, rows, num_sinks, num_recent, FRACTION: tl.constexpr, BLOCK: tl.constexpr):
    """One program finds what every row protects; nine decimals of the share count, half way to the even one."""
    row = tl.arange(0, BLOCK)
    allowed = tl.load(budget + row, mask=row < rows, other=1)
    first_sinks = tl.minimum(allowed - 1, num_sinks)
    scaled = allowed.to(tl.float64) * tl.full((BLOCK,), FRACTION, tl.float64) * 1e9
    whole = tl.floor(scaled)
    rest, number = scaled - whole, whole.to(tl.int64)
    number += ((rest > 0.5) | ((rest == 0.5) & (number % 2 == 1))).to(tl.int64)
    recent = tl.minimum(tl.maximum(number // 1000000000, num_recent), allowed - first_sinks)
    tl.store(sinks + row, first_sinks, mask=row < rows)
    tl.store(recent_from + row, tl.load(seen + row, mask=row < rows, other=0) - recent, mask=row < rows)


@triton.jit(do_not_specialize=["entries"])
def _outside(position, first, last, found, position_b, position_h, heads, entries, BLOCK: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    position += row // heads * position_b + row % heads * position_h
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = tl.load(position + at, mask=at < entries, other=-1)
    is_outside = _is_outside(there, first, last, row // heads)
    tl.store(found + row * entries + at, is_outside.to(tl.uint8), mask=at < entries)


def walk_along(entries: int) -> dict[str, int]:
    """Return how a program that walks along so many entries does it."""
    block = min(max(16, int(triton.next_power_of_2(entries))), _BLOCK)
    return {"BLOCK": block, "PART": min(block, _SORTED), "num_warps": 8 if block == _BLOCK else 4}


def _share_of(entries: int) -> int:
    """Return how many of a row's entries a program takes that looks at each by itself."""
    return min(max(16, int(triton.next_power_of_2(entries))), 1024)


def bytes_of(flag: Tensor) -> Tensor:
    """Return flags as a kernel reads them, a byte each and dense."""
    return flag.contiguous().view(torch.uint8)


@on_its_device
def nearest_anchor(anchor: Tensor, member: Tensor, position: Tensor) -> Tensor:
    """Return (B, H, T) int64 as `selection.nearest_anchor` does."""
    batch, heads, entries = position.shape
    nearest = torch.empty((batch, heads, entries), dtype=torch.int64, device=position.device)
    line = torch.empty((batch, heads, 3 * entries), dtype=torch.int32, device=position.device)
    position = in_line(position)
    _nearest_anchor[(batch * heads,)](
        bytes_of(anchor),
        bytes_of(member),
        position,
        line,
        nearest,
        *position.stride()[:2],
        heads,
        entries,
        **walk_along(entries),
    )
    return nearest


@on_its_device
def looked_at(
    keep: Tensor, into: Tensor | None, position: Tensor, budget: Tensor, *, exact: bool
) -> tuple[Tensor, Tensor]:
    """Return counts (B, H, 4) int64 and (4,) bool as `selection.looked_at` does."""
    batch, heads, entries = position.shape
    counts = torch.empty((batch, heads, 4), dtype=torch.int64, device=position.device)
    amiss = torch.empty((batch, heads, 4), dtype=torch.uint8, device=position.device)
    position = in_line(position)
    walk = walk_along(entries)
    _look[(batch * heads,)](
        bytes_of(keep),
        position if into is None else into.contiguous(),
        position,
        budget.contiguous(),
        counts,
        amiss,
        *position.stride()[:2],
        heads,
        entries,
        HAS_INTO=into is not None,
        EXACT=exact,
        BLOCK=walk["BLOCK"],
        num_warps=walk["num_warps"],
    )
    return counts, amiss.view(torch.bool).flatten(0, 1).any(dim=0)


@on_its_device
def shielded(score: Tensor, position: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """Return (B, H, T) float32 as `selection.shielded` does; score (B, H or 1, T)."""
    batch, heads, entries = position.shape
    made = torch.empty((batch, heads, entries), dtype=torch.float32, device=position.device)
    position = in_line(position)
    score = in_line(score).expand(position.shape)
    block = _share_of(entries)
    _shield[(triton.cdiv(entries, block), batch * heads)](
        score,
        position,
        first.expand(batch).contiguous(),
        last.expand(batch).contiguous(),
        made,
        *position.stride()[:2],
        *score.stride()[:2],
        heads,
        entries,
        BLOCK=block,
    )
    return made


@on_its_device
def has_nan(numbers: Tensor, position: Tensor) -> Tensor:
    """Return a bool of no dimensions as `selection.has_nan` does."""
    batch, heads, entries = position.shape
    position = in_line(position)
    block = _share_of(entries)
    grid = (triton.cdiv(entries, block), batch * heads)
    found = torch.empty(grid, dtype=torch.uint8, device=position.device)
    each = numbers.numel() // position.numel()
    _has_nan[grid](
        numbers.contiguous(), position, found, *position.stride()[:2], heads, entries, each, BLOCK=block, num_warps=4
    )
    return found.view(torch.bool).any()


@on_its_device
def protected_range(
    seen: Tensor, budget: Tensor, *, num_sinks: int, num_recent: int, recent_fraction: float
) -> tuple[Tensor, Tensor]:
    """Return (B,) int64 each as `selection.protected_range` does."""
    seen, budget = torch.broadcast_tensors(seen, budget)
    sinks, recent_from = torch.empty_like(budget), torch.empty_like(budget)
    _range[(1,)](
        seen.contiguous(),
        budget.contiguous(),
        sinks,
        recent_from,
        len(budget),
        num_sinks,
        num_recent,
        FRACTION=float(recent_fraction),
        BLOCK=int(triton.next_power_of_2(len(budget))),
        num_warps=1,
        enable_fp_fusion=False,  # a product is rounded before anything is taken from it
    )
    return sinks, recent_from


@on_its_device
def outside(position: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """Return (B, H, T) bool as `selection.outside` does."""
    batch, heads, entries = position.shape
    found = torch.empty((batch, heads, entries), dtype=torch.uint8, device=position.device)
    position = in_line(position)
    block = _share_of(entries)
    first, last = first.expand(batch).contiguous(), last.expand(batch).contiguous()
    _outside[(triton.cdiv(entries, block), batch * heads)](
        position, first, last, found, *position.stride()[:2], heads, entries, BLOCK=block
    )
    return found.view(torch.bool)
