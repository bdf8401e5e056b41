"""Decode attention over slots: split over the sequence, then joined, with the probabilities.

One query token per row attends to the first `length[b, h]` slots of each KV head (slots have no hole
when a step attends), which lie one head after the other, in a ragged buffer from `start[b, h]` on. A
program takes one (row, KV head) and one part of the slots and serves the whole group of query heads, so
keys and values are read once whatever the group. Where there are pairs enough a part is the whole; else a
second kernel joins the parts. Where a policy wants the probabilities they are made of the stored logits and
added to the mass in place, or written out, without another pass over the keys.

For positions inside the cache, stored keys are turned on the way in: by how far each entry's rank lies
before its position, from a table of cosines and sines. Only differences count: an entry that no eviction
moved meets the turned query, one that moved as far as the query meets it as it is, so of sinks and a
window no key is turned.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvbench.kernels.dispatch import interpreted, num_processors, on_its_device

# mypy: ignore-errors
# Kernels are written in Triton's language, not Python's.


@triton.jit
def _wide(states, UPCAST: tl.constexpr):
    """Return states as a product takes them: numpy, which interprets, has no bfloat16."""
    if UPCAST:
        return states.to(tl.float32)
    return states


@triton.jit
def _turned(first, second, cosines, sines, row, mask, UPCAST: tl.constexpr):
    """Return both halves of states turned back by the distance whose angles begin at `row` of the tables."""
    cos = tl.load(cosines + row, mask=mask, other=0.0)
    sin = tl.load(sines + row, mask=mask, other=0.0)
    back = (first * cos + second * sin).to(first.dtype)
    ahead = (second * cos - first * sin).to(first.dtype)
    return _wide(back, UPCAST), _wide(ahead, UPCAST)


@triton.jit
def _reduced(reduced, row, REDUCTION: tl.constexpr):
    """Return what a group has with the probabilities of one more query head."""
    return tl.maximum(reduced, row) if REDUCTION == "max" else reduced + row


@triton.jit
def _hand_out(
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
    """
    pair, part = tl.program_id(0), tl.program_id(1)
    row, head = pair // heads, pair % heads
    held = tl.load(length + pair).to(tl.int32)
    blocks = tl.cdiv(tl.cdiv(held, BLOCK_C), parts)
    first = part * blocks * BLOCK_C
    last = tl.minimum(first + blocks * BLOCK_C, held)

    g = tl.arange(0, BLOCK_G)[:, None]
    c = tl.arange(0, BLOCK_C)
    d = tl.arange(0, BLOCK_D)[None, :]
    in_group = g < GROUP
    q_at = query + row * query_row + (head * GROUP + g) * query_head
    row_base = pair.to(tl.int64) * capacity
    base = tl.load(head_start + pair) if RAGGED else row_base
    if TURN:
        half = width // 2
        h = tl.arange(0, BLOCK_D // 2)[None, :]
        in_half = h < half
        q1 = tl.load(q_at + h, mask=in_group & in_half, other=0.0)
        q2 = tl.load(q_at + half + h, mask=in_group & in_half, other=0.0)
        cosines_h, sines_h = cosines + h, sines + h
        query_behind = tl.load(seen + row) - held
        turned_q1, turned_q2 = _turned(q1, q2, cosines_h, sines_h, query_behind * half, in_half, UPCAST)
        q1, q2 = _wide(q1, UPCAST), _wide(q2, UPCAST)
    else:
        q = _wide(tl.load(q_at + d, mask=in_group & (d < width), other=0.0), UPCAST)
    peak = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_G,), tl.float32)
    acc = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    for start in range(first, last, BLOCK_C):
        slot = start + c
        inside = slot < last
        at = (base + slot)[:, None] * width
        if TURN:
            held_half = inside[:, None] & in_half
            k1 = tl.load(keys + at + h, mask=held_half, other=0.0)
            k2 = tl.load(keys + at + half + h, mask=held_half, other=0.0)
            behind = tl.load(position + base + slot, mask=inside, other=0)
            behind -= tl.load(rank + base + slot, mask=inside, other=0)
            between = inside & (behind != 0) & (behind != query_behind)
            if tl.max(between.to(tl.int32), 0) == 0:
                k1, k2 = _wide(k1, UPCAST), _wide(k2, UPCAST)
                s_as_far = tl.dot(q1, tl.trans(k1), input_precision=PRODUCT)
                s_as_far = tl.dot(q2, tl.trans(k2), s_as_far, input_precision=PRODUCT)
                s_in_place = tl.dot(turned_q1, tl.trans(k1), input_precision=PRODUCT)
                s_in_place = tl.dot(turned_q2, tl.trans(k2), s_in_place, input_precision=PRODUCT)
                s = tl.where((behind == 0)[None, :], s_in_place, s_as_far)
            else:
                k1, k2 = _turned(k1, k2, cosines_h, sines_h, behind[:, None] * half, held_half, UPCAST)
                s = tl.dot(turned_q1, tl.trans(k1), input_precision=PRODUCT)
                s = tl.dot(turned_q2, tl.trans(k2), s, input_precision=PRODUCT)
        else:
            k = _wide(tl.load(keys + at + d, mask=inside[:, None] & (d < width), other=0.0), UPCAST)
            s = tl.dot(q, tl.trans(k), input_precision=PRODUCT)
        v = _wide(tl.load(values + at + d, mask=inside[:, None] & (d < width), other=0.0), UPCAST)
        s = tl.where(inside[None, :], s * scaling, float("-inf"))
        if WANT_LOGITS:
            tl.store(logits + (row_base * GROUP + g * capacity) + slot[None, :], s, mask=in_group & inside[None, :])
        new_peak = tl.maximum(peak, tl.max(s, 1))
        shrink = tl.exp(peak - new_peak)
        p = tl.exp(s - new_peak[:, None])
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRODUCT)
        peak = new_peak
    if WHOLE:
        to = output + (pair * GROUP + g).to(tl.int64) * width + d
        tl.store(to, (acc / total[:, None]).to(output.dtype.element_ty), mask=in_group & (d < width))
        if ADD_MASS or WANT_PROBS:
            tl.debug_barrier()  # logits were written by other threads than those that read them
            one = tl.arange(0, BLOCK_G)
            for start in range(0, capacity if WANT_PROBS else held, BLOCK_S):
                slot = start + tl.arange(0, BLOCK_S)
                inside = slot < held
                reduced = tl.zeros((BLOCK_S,), tl.float32)
                for member in tl.static_range(GROUP):
                    s = tl.load(logits + row_base * GROUP + member * capacity + slot, mask=inside, other=float("-inf"))
                    its_peak = tl.sum(tl.where(one == member, peak, 0.0), 0)
                    its_total = tl.sum(tl.where(one == member, total, 0.0), 0)
                    reduced = _reduced(reduced, tl.exp(s - its_peak) / its_total, REDUCTION)
                _hand_out(
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
        out = (pair * parts + part) * GROUP + tl.arange(0, BLOCK_G)
        one = tl.arange(0, BLOCK_G) < GROUP
        tl.store(peaks + out, peak, mask=one)
        tl.store(sums + out, total, mask=one)
        tl.store(partial + out[:, None].to(tl.int64) * width + d, acc, mask=in_group & (d < width))


@triton.jit
def _weights(peaks, sums, at):
    """Return the whole row's peak, each part's weight and the row's sum."""
    part_peak = tl.load(peaks + at)
    peak = tl.max(part_peak, 0)
    weight = tl.exp(part_peak - peak)
    return peak, weight, tl.sum(weight * tl.load(sums + at), 0)


@triton.jit(do_not_specialize=["capacity"])
def join_parts(
    partial,
    peaks,
    sums,
    logits,
    length,
    output,
    mass,
    probs,
    head_start,
    capacity,
    width,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    REDUCTION: tl.constexpr,
    ADD_MASS: tl.constexpr,
    WANT_PROBS: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """Join the parts, a power of two, of one (row, KV head); output (pair, group, D); mass, probs (pair, C) float32."""
    pair, block = tl.program_id(0), tl.program_id(1)
    p = tl.arange(0, PARTS)
    if block < GROUP:  # one program for the output of each query head, the others for slots
        d = tl.arange(0, BLOCK_D)
        at = (pair * PARTS + p) * GROUP + block
        peak, weight, total = _weights(peaks, sums, at)
        parts = tl.load(partial + at[:, None].to(tl.int64) * width + d[None, :], mask=d[None, :] < width, other=0.0)
        joined = tl.sum(parts * weight[:, None], 0) / total
        tl.store(output + (pair * GROUP + block) * width + d, joined.to(output.dtype.element_ty), mask=d < width)
    elif ADD_MASS or WANT_PROBS:
        slot = (block - GROUP) * BLOCK_C + tl.arange(0, BLOCK_C)
        inside = slot < tl.load(length + pair)
        row_base = pair.to(tl.int64) * capacity
        base = tl.load(head_start + pair) if RAGGED else row_base
        reduced = tl.zeros((BLOCK_C,), tl.float32)
        for g in tl.static_range(GROUP):
            peak, weight, total = _weights(peaks, sums, (pair * PARTS + p) * GROUP + g)
            s = tl.load(logits + row_base * GROUP + g * capacity + slot, mask=inside, other=float("-inf"))
            reduced = _reduced(reduced, tl.exp(s - peak) / total, REDUCTION)
        mass_at, probs_at = mass + base, probs + row_base
        _hand_out(reduced, mass_at, probs_at, slot, inside, capacity, GROUP, REDUCTION, ADD_MASS, WANT_PROBS)


_BLOCK_SLOTS, _STAGES, _WARPS = 32, 4, 2  # measured on an H200 (docs/log.md)
_TURN_SLOTS, _TURN_STAGES, _TURN_WARPS = 32, 3, 2  # turning takes registers and shared memory
_JOIN_SLOTS = 1024
_GIVEN_SLOTS = 256  # at once, of one part; 128 and 512 take as long on an H200
_PRODUCT = "tf32x3"  # of float32: three of shorter numbers on the matrix units, as near to exact as one without them
_MAX_PARTS = 64
_PROGRAMS_PER_PROCESSOR = 2
_NEARLY = 0.9  # of them: 8 x 32 heads in one part each leave 8 of 264 idle, and need no joining


class Turn(NamedTuple):
    """What turning stored keys to their ranks needs: seen (B,), position and rank (B, H, C), tables (P, D / 2)."""

    seen: Tensor
    position: Tensor
    rank: Tensor
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
) -> tuple[Tensor, Tensor | None]:
    """Return output (B, Hq, 1, D) and probabilities (B, H, C) float32 or None; `mass` grows in place.

    query (B, Hq, 1, D) with a dense last dimension; keys, values (B, H, C, D) contiguous; length (B, H)
    int64: the first slots of each head hold tokens. With `turn`, query and keys are taken at their ranks.

    ragged: then keys and values are (N, D), mass and the columns of `turn` (N,); C is its capacity.
    """
    (batch, heads), width = length.shape, keys.shape[-1]
    capacity = keys.shape[2] if ragged is None else ragged.capacity
    head_start = length if ragged is None else ragged.start
    group = query.shape[1] // heads
    pairs = batch * heads
    tile = (_TURN_SLOTS, _TURN_STAGES, _TURN_WARPS) if turn else (_BLOCK_SLOTS, _STAGES, _WARPS)
    block_slots, stages, warps = tile
    parts = _num_parts(pairs, triton.cdiv(capacity, block_slots), query.device)
    new = query.new_empty
    is_whole = parts == 1
    partial = new((0,) if is_whole else (pairs, parts, group, width), dtype=torch.float32)
    peaks, sums = new((2, 0) if is_whole else (2, pairs, parts, group), dtype=torch.float32)
    want_rows = mass is not None or want_probs
    handed_out = {"REDUCTION": reduction, "ADD_MASS": mass is not None, "WANT_PROBS": want_probs}
    logits = new((pairs, group, capacity), dtype=torch.float32) if want_rows else partial
    probs = new((batch, heads, capacity), dtype=torch.float32) if want_probs else None
    output = new((batch, heads * group, 1, width))
    to_mass, to_probs = partial if mass is None else mass, partial if probs is None else probs
    block_d = max(32 if turn else 16, triton.next_power_of_2(width))  # a product sums over 16 numbers at least
    attend_part[(pairs, parts)](
        query,
        keys,
        values,
        length,
        *(turn or (length, length, length, partial, partial)),
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
        BLOCK_G=max(16, triton.next_power_of_2(group)),
        BLOCK_C=block_slots,
        BLOCK_D=block_d,
        WANT_LOGITS=want_rows,
        TURN=turn is not None,
        PRODUCT=_PRODUCT,
        UPCAST=interpreted(),
        RAGGED=ragged is not None,
        WHOLE=is_whole,
        BLOCK_S=_GIVEN_SLOTS,
        **(handed_out if is_whole else dict.fromkeys(handed_out, False)),
        num_warps=warps,
        num_stages=stages,
    )
    if is_whole:
        return output, probs
    join_parts[(pairs, group + (triton.cdiv(capacity, _JOIN_SLOTS) if want_rows else 0))](
        partial,
        peaks,
        sums,
        logits,
        length,
        output,
        to_mass,
        to_probs,
        head_start,
        capacity,
        width,
        PARTS=parts,
        GROUP=group,
        BLOCK_C=_JOIN_SLOTS,
        BLOCK_D=block_d,
        RAGGED=ragged is not None,
        **handed_out,
        num_warps=4,
    )
    return output, probs


def _num_parts(pairs: int, blocks: int, device: torch.device) -> int:
    """Enough programs nearly to fill the device, a power of two, and at least one of the `blocks` of slots for each."""
    wanted = _NEARLY * _PROGRAMS_PER_PROCESSOR * num_processors(device) / pairs
    parts = 1
    while parts < wanted and 2 * parts <= min(blocks, _MAX_PARTS):
        parts *= 2
    return parts
