"""Decode attention over slots: split over the sequence, then joined, with the probabilities.

One query token per row attends to the first `length[b, h]` slots of each KV head (slots have no hole
when a step attends), which lie one head after the other, in a ragged buffer from `start[b, h]` on. A
program takes one (row, KV head) and one part of the slots and serves the whole group of query heads, so
keys and values are read once whatever the group. Where there are pairs enough a part is the whole; else a
second kernel joins the parts. Where a policy wants the probabilities they are made of the stored logits and
added to the mass in place, or written out, without another pass over the keys: by the launch that has the whole,
else by one of their own, for which the output does not wait.

For positions inside the cache, stored keys are turned on the way in: by how far each entry's rank lies
before its position, from a table of cosines and sines. Only differences count: an entry that no eviction
moved meets the turned query, one that moved as far as the query meets it as it is. So where there is nothing
but sinks and a window no key is turned, and both forms of the queries are rows of one tile, which has room for
them anyway; whoever frees an entry notes whether that is so.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvbench.kernels.dispatch import interpreted, num_processors, on_its_device, shared_bytes

# mypy: ignore-errors
# Kernels are written in Triton's language, not Python's.


@triton.jit
def _wide(states, UPCAST: tl.constexpr):
    """Return states as a product takes them: numpy, which interprets, has no bfloat16."""
    if UPCAST:
        return states.to(tl.float32)
    return states


@triton.jit
def _turned(first, second, cosines, sines, row, mask):
    """Return both halves of states turned back by the distance whose angles begin at `row` of the tables."""
    cos = tl.load(cosines + row, mask=mask, other=0.0)
    sin = tl.load(sines + row, mask=mask, other=0.0)
    back = (first * cos + second * sin).to(first.dtype)
    ahead = (second * cos - first * sin).to(first.dtype)
    return back, ahead


@triton.jit
def _taken_in(s, v, peak, total, acc, PRODUCT: tl.constexpr, ROWS_MAY_BE_EMPTY: tl.constexpr):
    """Return peak, sum and weighted values of rows after another block with logits `s`."""
    new_peak = tl.maximum(peak, tl.max(s, 1))
    from_peak = tl.where(new_peak == float("-inf"), 0.0, new_peak) if ROWS_MAY_BE_EMPTY else new_peak
    shrink = tl.exp(peak - from_peak)
    p = tl.exp(s - from_peak[:, None])
    total = total * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRODUCT)
    return new_peak, total, acc


@triton.jit
def _reduced(reduced, row, REDUCTION: tl.constexpr):
    """Return what a group has with the probabilities of one more query head."""
    return tl.maximum(reduced, row) if REDUCTION == "max" else reduced + row


@triton.jit
def _give(
    reduced,
    mass,
    probs,
    slot,
    inside,
    capacity,
    GROUP: tl.constexpr,
    REDUCTION: tl.constexpr,
    ADD_MASS: tl.constexpr,
    WANT_PROBS: tl.constexpr,
):
    """Add the probabilities of some slots of a pair to its mass, write them out, or both."""
    if REDUCTION == "mean":
        reduced = reduced / GROUP
    if ADD_MASS:
        tl.store(mass + slot, tl.load(mass + slot, mask=inside, other=0.0) + reduced, mask=inside)
    if WANT_PROBS:
        tl.store(probs + slot, reduced, mask=slot < capacity)


@triton.jit(do_not_specialize=["capacity", "parts"])
def attend_part(
    query,
    keys,
    values,
    length,
    seen,
    position,
    rank,
    in_place,
    cosines,
    sines,
    partial,
    peaks,
    sums,
    logits,
    output,
    mass,
    probs,
    head_start,
    scaling,
    heads,
    capacity,
    width,
    query_row,
    query_head,
    parts,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WANT_LOGITS: tl.constexpr,
    TURN: tl.constexpr,
    PRODUCT: tl.constexpr,
    UPCAST: tl.constexpr,
    RAGGED: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    REDUCTION: tl.constexpr,
    ADD_MASS: tl.constexpr,
    WANT_PROBS: tl.constexpr,
):
    """Attend to one part of the slots; partial results are (pair, part, group), logits (pair, group, C).

    With WHOLE it is the only part: the output (pair, group, D), mass and probs (pair, C) are written at once.

    With TURN the lower half of the rows has the queries as they are, for entries that moved as far, the upper half
    the queries turned, for the others: the first slots, those in their places. A slot counts in one of the halves,
    which are joined at the end. Where the others did not all move as far, all keys are turned, for the upper half.
    """
    pair, part = tl.program_id(0), tl.program_id(1)
    row, head = pair // heads, pair % heads
    held = tl.load(length + pair).to(tl.int32)
    blocks = tl.cdiv(tl.cdiv(held, BLOCK_C), parts)
    first = part * blocks * BLOCK_C
    last = tl.minimum(first + blocks * BLOCK_C, held)

    members: tl.constexpr = BLOCK_G // 2 if TURN else BLOCK_G
    r = tl.arange(0, BLOCK_G)
    g = (r % members)[:, None]
    c = tl.arange(0, BLOCK_C)
    d = tl.arange(0, BLOCK_D)[None, :]
    in_group = g < GROUP
    q_at = query + row * query_row + (head * GROUP + g) * query_head
    row_base = pair.to(tl.int64) * capacity
    base = tl.load(head_start + pair) if RAGGED else row_base
    q = tl.load(q_at + d, mask=in_group & (d < width), other=0.0)
    all_plain = True
    if TURN:
        half = width // 2
        is_upper = (r >= members)[:, None]
        query_behind = tl.load(seen + row) - held
        other_half = tl.load(q_at + tl.where(d < half, d + half, d - half), mask=in_group & (d < width), other=0.0)
        of_angle = query_behind * half + tl.where(d < half, d, d - half)
        cos = tl.load(cosines + of_angle, mask=d < width, other=0.0)
        sin = tl.load(sines + of_angle, mask=d < width, other=0.0)
        turned = (q * cos + tl.where(d < half, other_half, -other_half) * sin).to(q.dtype)
        q = tl.where(is_upper, turned, q)
        placed = tl.load(in_place + pair)
        all_plain = placed >= 0
    q = _wide(q, UPCAST)
    peak = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_G,), tl.float32)
    acc = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    if all_plain:
        for start in range(first, last, BLOCK_C):
            slot = start + c
            inside = slot < last
            counts = inside[None, :]
            at = (base + slot)[:, None] * width
            k = _wide(tl.load(keys + at + d, mask=inside[:, None] & (d < width), other=0.0), UPCAST)
            v = _wide(tl.load(values + at + d, mask=inside[:, None] & (d < width), other=0.0), UPCAST)
            if TURN:
                counts = counts & ((slot < placed)[None, :] == is_upper)
            s = tl.dot(q, tl.trans(k), input_precision=PRODUCT)
            s = tl.where(counts, s * scaling, float("-inf"))
            if WANT_LOGITS:
                tl.store(logits + (row_base * GROUP + g * capacity) + slot[None, :], s, mask=in_group & counts)
            peak, total, acc = _taken_in(s, v, peak, total, acc, PRODUCT, TURN)
    elif TURN:
        h = tl.arange(0, BLOCK_D // 2)[None, :]
        in_half = h < half
        q1 = tl.load(q_at + h, mask=in_group & in_half, other=0.0)
        q2 = tl.load(q_at + half + h, mask=in_group & in_half, other=0.0)
        q1, q2 = _turned(q1, q2, cosines + h, sines + h, query_behind * half, in_half)
        q1, q2 = _wide(q1, UPCAST), _wide(q2, UPCAST)
        for start in range(first, last, BLOCK_C):
            slot = start + c
            inside = slot < last
            at = (base + slot)[:, None] * width
            held_half = inside[:, None] & in_half
            k1 = tl.load(keys + at + h, mask=held_half, other=0.0)
            k2 = tl.load(keys + at + half + h, mask=held_half, other=0.0)
            v = _wide(tl.load(values + at + d, mask=inside[:, None] & (d < width), other=0.0), UPCAST)
            behind = tl.load(position + base + slot, mask=inside, other=0)
            behind -= tl.load(rank + base + slot, mask=inside, other=0)
            k1, k2 = _turned(k1, k2, cosines + h, sines + h, behind[:, None] * half, held_half)
            s = tl.dot(q1, tl.trans(_wide(k1, UPCAST)), input_precision=PRODUCT)
            s = tl.dot(q2, tl.trans(_wide(k2, UPCAST)), s, input_precision=PRODUCT)
            counts = inside[None, :] & is_upper
            s = tl.where(counts, s * scaling, float("-inf"))
            if WANT_LOGITS:
                tl.store(logits + (row_base * GROUP + g * capacity) + slot[None, :], s, mask=in_group & counts)
            peak, total, acc = _taken_in(s, v, peak, total, acc, PRODUCT, TURN)
    if TURN:
        halves = tl.reshape(peak, (2, members))
        peak = tl.max(halves, 0)
        shrink = tl.exp(halves - tl.where(peak == float("-inf"), 0.0, peak)[None, :])
        total = tl.sum(tl.reshape(total, (2, members)) * shrink, 0)
        acc = acc * tl.reshape(shrink, (BLOCK_G,))[:, None]
        acc = tl.sum(tl.reshape(acc, (2, members, BLOCK_D)), 0)
    one = tl.arange(0, members)
    if WHOLE:
        to = output + (pair * GROUP + one).to(tl.int64)[:, None] * width + d
        in_output = (one < GROUP)[:, None] & (d < width)
        tl.store(to, (acc / total[:, None]).to(output.dtype.element_ty), mask=in_output)
        if ADD_MASS or WANT_PROBS:
            tl.debug_barrier()  # logits were written by other threads than those that read them
            for start in range(0, capacity if WANT_PROBS else held, BLOCK_S):
                slot = start + tl.arange(0, BLOCK_S)
                inside = slot < held
                reduced = tl.zeros((BLOCK_S,), tl.float32)
                for member in tl.static_range(GROUP):
                    s = tl.load(logits + row_base * GROUP + member * capacity + slot, mask=inside, other=float("-inf"))
                    its_peak = tl.sum(tl.where(one == member, peak, 0.0), 0)
                    its_total = tl.sum(tl.where(one == member, total, 0.0), 0)
                    reduced = _reduced(reduced, tl.exp(s - its_peak) / its_total, REDUCTION)
                _give(
                    reduced,
                    mass + base,
                    probs + row_base,
                    slot,
                    inside,
                    capacity,
                    GROUP,
                    REDUCTION,
                    ADD_MASS,
                    WANT_PROBS,
                )
    else:
        out = (pair * parts + part) * GROUP + one
        tl.store(peaks + out, peak, mask=one < GROUP)
        tl.store(sums + out, total, mask=one < GROUP)
        tl.store(partial + out[:, None].to(tl.int64) * width + d, acc, mask=(one < GROUP)[:, None] & (d < width))


@triton.jit
def _weights(peaks, sums, at):
    """Return the whole row's peak, each part's weight and the row's sum."""
    part_peak = tl.load(peaks + at)
    peak = tl.max(part_peak, 0)
    weight = tl.exp(part_peak - peak)
    return peak, weight, tl.sum(weight * tl.load(sums + at), 0)


@triton.jit
def join_parts(
    partial,
    peaks,
    sums,
    output,
    width,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Join the parts, a power of two, of one query head; output (pair, group, D)."""
    pair, member = tl.program_id(0), tl.program_id(1)
    p = tl.arange(0, PARTS)
    d = tl.arange(0, BLOCK_D)
    at = (pair * PARTS + p) * GROUP + member
    _, weight, total = _weights(peaks, sums, at)
    parts = tl.load(partial + at[:, None].to(tl.int64) * width + d[None, :], mask=d[None, :] < width, other=0.0)
    joined = tl.sum(parts * weight[:, None], 0) / total
    tl.store(output + (pair * GROUP + member) * width + d, joined.to(output.dtype.element_ty), mask=d < width)


@triton.jit(do_not_specialize=["capacity"])
def hand_out(
    peaks,
    sums,
    logits,
    length,
    mass,
    probs,
    head_start,
    capacity,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_C: tl.constexpr,
    REDUCTION: tl.constexpr,
    ADD_MASS: tl.constexpr,
    WANT_PROBS: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """Make the probabilities of some slots of a pair of what its parts, a power of two, left: mass, probs (pair, C)."""
    pair, block = tl.program_id(0), tl.program_id(1)
    p = tl.arange(0, PARTS)
    slot = block * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = slot < tl.load(length + pair)
    row_base = pair.to(tl.int64) * capacity
    base = tl.load(head_start + pair) if RAGGED else row_base
    reduced = tl.zeros((BLOCK_C,), tl.float32)
    for g in tl.static_range(GROUP):
        peak, _, total = _weights(peaks, sums, (pair * PARTS + p) * GROUP + g)
        s = tl.load(logits + row_base * GROUP + g * capacity + slot, mask=inside, other=float("-inf"))
        reduced = _reduced(reduced, tl.exp(s - peak) / total, REDUCTION)
    _give(reduced, mass + base, probs + row_base, slot, inside, capacity, GROUP, REDUCTION, ADD_MASS, WANT_PROBS)


class Tile(NamedTuple):
    """How a program goes through its slots: so many at once, blocks on their way, warps."""

    slots: int
    stages: int
    warps: int


# Measured on an H200 (docs/log.md). Where programs are many they should be small, so that all are at work at once.
_FEW, _MANY, _VERY_MANY = Tile(32, 4, 2), Tile(16, 4, 1), Tile(32, 2, 2)
_NARROW, _NARROW_FLOATS = Tile(16, 4, 1), Tile(64, 2, 4)
_LEAST = Tile(16, 2, 1)
_HAND_OUT_SLOTS = 1024
_GIVEN_SLOTS = 256  # at once, of one part; 128 and 512 take as long on an H200
_PRODUCT = "tf32x3"  # of float32: three of shorter numbers on the matrix units, as near to exact as one without them
_MAX_PARTS = 64
_NARROW_WIDTH = 64
_ROW_BYTES = 512  # of the keys that the programs on a processor read at once, two of 128 numbers or four of 64
_NEARLY = 0.9  # of them: 8 x 32 heads in one part each leave 8 of 264 idle, and need no joining


class Turn(NamedTuple):
    """What turning stored keys to their ranks needs: seen (B,), position and rank (B, H, C), tables (P, D / 2).

    in_place (B, H) int32: so many first slots hold entries whose rank is their position, and all others lie before
    theirs by as much as the query; -1 where that is not so, or not known.
    """

    seen: Tensor
    position: Tensor
    rank: Tensor
    in_place: Tensor
    cosines: Tensor
    sines: Tensor


class Ragged(NamedTuple):
    """Where heads of different lengths lie in one buffer: start (B, H) int64, and the slots of the largest."""

    start: Tensor
    capacity: int


@on_its_device
def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    scaling: float,
    *,
    reduction: str = "mean",
    mass: Tensor | None = None,
    want_probs: bool = False,
    turn: Turn | None = None,
    ragged: Ragged | None = None,
) -> tuple[Tensor, Callable[[], Tensor | None]]:
    """Return output (B, Hq, 1, D), and what is to be called for the rest, in time before `length` or `mass` change.

    That returns probabilities (B, H, C) float32 or None and lets `mass` grow in place, if the output's launch did not.

    query (B, Hq, 1, D) with a dense last dimension; keys, values (B, H, C, D) contiguous; length (B, H)
    int64: the first slots of each head hold tokens. With `turn`, query and keys are taken at their ranks.

    ragged: then keys and values are (N, D), mass and the columns of `turn` (N,); C is its capacity.
    """
    (batch, heads), width = length.shape, keys.shape[-1]
    capacity = keys.shape[2] if ragged is None else ragged.capacity
    head_start = length if ragged is None else ragged.start
    group = query.shape[1] // heads
    pairs = batch * heads
    query_rows = max(16, (2 if turn else 1) * triton.next_power_of_2(group))
    processors, room = num_processors(keys.device), shared_bytes(keys.device)
    tile = _tile(pairs, width, keys.element_size(), query_rows, processors, room)
    parts = _num_parts(pairs, triton.cdiv(capacity, tile.slots), keys)
    new = query.new_empty
    is_whole = parts == 1
    partial = new((0,) if is_whole else (pairs, parts, group, width), dtype=torch.float32)
    peaks, sums = new((2, 0) if is_whole else (2, pairs, parts, group), dtype=torch.float32)
    want_rows = mass is not None or want_probs
    reduced = {"REDUCTION": reduction, "ADD_MASS": mass is not None, "WANT_PROBS": want_probs}
    logits = new((pairs, group, capacity), dtype=torch.float32) if want_rows else partial
    probs = new((batch, heads, capacity), dtype=torch.float32) if want_probs else None
    output = new((batch, heads * group, 1, width))
    to_mass, to_probs = sums if mass is None else mass, sums if probs is None else probs
    block_d = max(32 if turn else 16, triton.next_power_of_2(width))  # a product sums over 16 numbers at least
    attend_part[(pairs, parts)](
        query,
        keys,
        values,
        length,
        *(turn or (length, length, length, length, partial, partial)),
        partial,
        peaks,
        sums,
        logits,
        output,
        to_mass,
        to_probs,
        head_start,
        scaling,
        heads,
        capacity,
        width,
        *query.stride()[:2],
        parts,
        GROUP=group,
        BLOCK_G=query_rows,
        BLOCK_C=tile.slots,
        BLOCK_D=block_d,
        WANT_LOGITS=want_rows,
        TURN=turn is not None,
        PRODUCT=_PRODUCT,
        UPCAST=interpreted(),
        RAGGED=ragged is not None,
        WHOLE=is_whole,
        BLOCK_S=_GIVEN_SLOTS,
        **(reduced if is_whole else dict.fromkeys(reduced, False)),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if not is_whole:
        join_parts[(pairs, group)](
            partial, peaks, sums, output, width, PARTS=parts, GROUP=group, BLOCK_D=block_d, num_warps=4
        )
    if is_whole or not want_rows:
        return output, lambda: probs

    @on_its_device
    def handed_out(peaks: Tensor) -> Tensor | None:
        hand_out[(pairs, triton.cdiv(capacity, _HAND_OUT_SLOTS))](
            peaks,
            sums,
            logits,
            length,
            to_mass,
            to_probs,
            head_start,
            capacity,
            PARTS=parts,
            GROUP=group,
            BLOCK_C=_HAND_OUT_SLOTS,
            RAGGED=ragged is not None,
            **reduced,
            num_warps=4,
        )
        return probs

    return output, lambda: handed_out(peaks)


@cache
def _tile(pairs: int, width: int, number_bytes: int, query_rows: int, processors: int, room: int) -> Tile:
    """Return the tile for keys of so many pairs and numbers, cut to the `room` in bytes that threads share."""
    if width <= _NARROW_WIDTH:
        tile = _NARROW if number_bytes == 2 else _NARROW_FLOATS
    elif pairs <= 2 * processors:
        tile = _FEW
    else:
        tile = _MANY if pairs <= 8 * processors else _VERY_MANY
    width = triton.next_power_of_2(width)
    while tile.slots > _LEAST.slots or tile.stages > _LEAST.stages:
        # more than any shape was compiled to: a block being turned beside those on their way, and some of the queries
        if 2 * tile.stages * tile.slots * width * number_bytes + 10 * query_rows * width <= room:
            break
        fewer = tile.stages > _LEAST.stages
        tile = tile._replace(stages=tile.stages - 1) if fewer else tile._replace(slots=tile.slots // 2)
    return tile


def _num_parts(pairs: int, blocks: int, keys: Tensor) -> int:
    """Enough programs nearly to fill the device, a power of two, and at least one of the `blocks` of slots for each."""
    programs = max(2, _ROW_BYTES // (keys.shape[-1] * keys.element_size())) * num_processors(keys.device)
    parts = 1
    while parts * pairs < _NEARLY * programs and 2 * parts <= min(blocks, _MAX_PARTS):
        parts *= 2
    return parts
