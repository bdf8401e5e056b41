"""Write the new token into the free slot, and free the victim's: one launch each, nothing waits.

A program takes one (row, KV head). `rank` is kept only where positions count inside the cache: the
new token is the youngest, and freeing a victim moves everyone younger than it one place down.
"""

# mypy: ignore-errors
# Kernels are written in Triton's language, not Python's.

import triton
import triton.language as tl


@triton.jit
def write_token(
    new_keys,
    new_values,
    keys,
    values,
    position,
    kind,
    mass,
    rank,
    length,
    free,
    seen,
    heads,
    capacity,
    width,
    key_row,
    key_head,
    value_row,
    value_head,
    BLOCK_D: tl.constexpr,
    HAS_MASS: tl.constexpr,
    HAS_RANK: tl.constexpr,
    ADVANCE: tl.constexpr,
):
    """Put one token (row, head, D) at position seen - 1 into slot `free`; with ADVANCE the next slot is free."""
    pair = tl.program_id(0)
    row, head = pair // heads, pair % heads
    d = tl.arange(0, BLOCK_D)
    slot = tl.load(free + pair)
    held = tl.load(length + pair)
    entry = pair.to(tl.int64) * capacity + slot
    k = tl.load(new_keys + row * key_row + head * key_head + d, mask=d < width)
    v = tl.load(new_values + row * value_row + head * value_head + d, mask=d < width)
    tl.store(keys + entry * width + d, k, mask=d < width)
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


@triton.jit
def free_victim(
    score,
    victim,
    position,
    rank,
    length,
    free,
    faults,
    budget,
    sinks,
    recent_from,
    heads,
    capacity,
    score_row,
    score_head,
    BLOCK_C: tl.constexpr,
    GIVEN: tl.constexpr,
    HAS_RANK: tl.constexpr,
    APPLY: tl.constexpr,
):
    """Free a slot of each pair that is over its budget: `victim`, or the lowest score, the oldest of equals.

    Without APPLY every pair's choice is written to `victim` and nothing else changes.

    Sinks (position < sinks) and the recent window (position >= recent_from) count as infinite scores. What is no
    choice is noted in `faults` (pair,), as kvbench.cache.slots names it: 1 for NaN among the other scores, which
    -1 says of a given victim, 2 for a given victim that is no slot with a token.
    """
    pair = tl.program_id(0)
    row, head = pair // heads, pair % heads
    held = tl.load(length + pair)
    over = (held > tl.load(budget + row)) | (not APPLY)
    base = pair.to(tl.int64) * capacity
    c = tl.arange(0, BLOCK_C)
    chosen = held * 0
    if over:
        fault = (held * 0).to(tl.int32)
        if GIVEN:
            chosen = tl.load(victim + pair)
            wrong = (chosen < 0) | (chosen >= held)
            fault = tl.where(wrong, tl.where(chosen == -1, 1, 2), fault)
            chosen = tl.where(wrong, 0, chosen)
        else:
            first_sinks = tl.load(sinks + row)
            recent = tl.load(recent_from + row)
            lowest = tl.full((BLOCK_C,), float("inf"), tl.float32)
            oldest = tl.full((BLOCK_C,), 9223372036854775807, tl.int64)
            place = tl.zeros((BLOCK_C,), tl.int64)
            unknown = tl.zeros((BLOCK_C,), tl.int32)
            for start in range(0, held, BLOCK_C):
                slot = start + c
                p = tl.load(position + base + slot, mask=slot < held, other=-1)
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
            oldest = tl.where(lowest == least, oldest, 9223372036854775807)
            age = tl.min(oldest, 0)
            chosen = tl.min(tl.where(oldest == age, place, 9223372036854775807), 0)
            fault = tl.max(unknown, 0)
        if not APPLY:
            tl.store(victim + pair, chosen)
        elif HAS_RANK:
            gone = tl.load(rank + base + chosen)
            for start in range(0, held, BLOCK_C):
                slot = start + c
                r = tl.load(rank + base + slot, mask=slot < held, other=0)
                tl.store(rank + base + slot, r - (r > gone).to(r.dtype), mask=slot < held)
        if APPLY:
            if fault > 0:
                tl.store(faults + pair, tl.load(faults + pair) | fault)
            tl.store(position + base + chosen, -1)
            tl.store(length + pair, held - 1)
            tl.store(free + pair, chosen)
    else:
        tl.store(free + pair, held)
