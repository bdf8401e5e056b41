"""What a decode step does between its products: residual sum with RMSNorm, rotary angles, rotation; a launch each.

All in float32 and rounded once at the end, where the stock models round in between; only the residual sum is theirs to
the bit, because everything after it starts from it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from kvbench.kernels.dispatch import Unturned, in_line, interpreted, on_its_device

# mypy: ignore-errors
# Kernels are written in Triton's language, not Python's.


@triton.jit
def norm_row(x, delta, weight, total, normed, width, epsilon, BLOCK: tl.constexpr, ADD: tl.constexpr):
    """Make a row of total = x + delta and of normed = RMSNorm(total) weight: all (rows, K).

    ADD: how many parts of delta, (ADD, rows, K), are added up before; 0 for a norm alone.
    """
    k = tl.arange(0, BLOCK)
    inside = k < width
    at = tl.program_id(0).to(tl.int64) * width + k
    states = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        added = tl.load(delta + at, mask=inside, other=0.0).to(tl.float32)
        for part in tl.static_range(1, ADD):
            part_at = part * tl.num_programs(0) * width + at
            added += tl.load(delta + part_at, mask=inside, other=0.0).to(tl.float32)
        states += added.to(total.dtype.element_ty).to(tl.float32)
        states = states.to(total.dtype.element_ty)
        tl.store(total + at, states, mask=inside)
        states = states.to(tl.float32)
    scale = tl.rsqrt(tl.sum(states * states, 0) / width + epsilon)
    out = states * scale * tl.load(weight + k, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + at, out.to(normed.dtype.element_ty), mask=inside)


@triton.jit
def angles_of_row(
    position, frequencies, cosines, sines, position_row, half, scaling, BLOCK: tl.constexpr, INTERPRETED: tl.constexpr
):
    """Write the cosines and sines (rows, D) of position times frequencies (D / 2,), both halves alike."""
    row, d = tl.program_id(0), tl.arange(0, BLOCK)
    inside = d < half
    angle = tl.load(position + row * position_row).to(tl.float32) * tl.load(frequencies + d, mask=inside, other=0.0)
    if INTERPRETED:  # without the functions of a GPU
        cosine, sine = tl.cos(angle), tl.sin(angle)
    else:  # tl.cos is made for small angles
        cosine, sine = libdevice.cos(angle), libdevice.sin(angle)
    at = row * 2 * half + d
    for part in tl.static_range(2):
        tl.store(cosines + at + part * half, (cosine * scaling).to(cosines.dtype.element_ty), mask=inside)
        tl.store(sines + at + part * half, (sine * scaling).to(sines.dtype.element_ty), mask=inside)


@triton.jit
def turned_halves(states, at, cosines, sines, table_at, half, d):
    """Rotate the head (D,) of `states` that begins at `at`; both halves in float32."""
    inside = d < half
    cos1 = tl.load(cosines + table_at + d, mask=inside, other=0.0).to(tl.float32)
    cos2 = tl.load(cosines + table_at + half + d, mask=inside, other=0.0).to(tl.float32)
    sin1 = tl.load(sines + table_at + d, mask=inside, other=0.0).to(tl.float32)
    sin2 = tl.load(sines + table_at + half + d, mask=inside, other=0.0).to(tl.float32)
    x1 = tl.load(states + at + d, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(states + at + half + d, mask=inside, other=0.0).to(tl.float32)
    return x1 * cos1 - x2 * sin1, x2 * cos2 + x1 * sin2


@triton.jit
def rotate_head(
    queries,
    keys,
    cosines,
    sines,
    turned_queries,
    turned_keys,
    query_heads,
    key_heads,
    half,
    query_row,
    query_head,
    key_row,
    key_head,
    table_row,
    BLOCK: tl.constexpr,
):
    """Rotate one head of one row, of the queries or of the keys; the turned ones are (rows, heads, D), dense."""
    row, head = tl.program_id(0), tl.program_id(1)
    d = tl.arange(0, BLOCK)
    inside = d < half
    if head < query_heads:
        at = row * query_row + head * query_head
        low, high = turned_halves(queries, at, cosines, sines, row * table_row, half, d)
        to = turned_queries + (row * query_heads + head) * 2 * half + d
        tl.store(to, low.to(turned_queries.dtype.element_ty), mask=inside)
        tl.store(to + half, high.to(turned_queries.dtype.element_ty), mask=inside)
    else:
        head -= query_heads
        at = row * key_row + head * key_head
        low, high = turned_halves(keys, at, cosines, sines, row * table_row, half, d)
        to = turned_keys + (row * key_heads + head) * 2 * half + d
        tl.store(to, low.to(turned_keys.dtype.element_ty), mask=inside)
        tl.store(to + half, high.to(turned_keys.dtype.element_ty), mask=inside)


def norm_rows(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Return RMSNorm(x) weight: x (B, 1, K) contiguous, weight (K,)."""
    normed = torch.empty_like(x)
    _norm(x, x, weight, x, normed, epsilon, add=0)
    return normed


def add_and_norm_rows(x: Tensor, delta: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return x + delta and RMSNorm(x + delta) weight: x, delta (B, 1, K) contiguous, weight (K,).

    delta may come as parts (P, B, 1, K) that are to be added up, in float32, and rounded.
    """
    total, normed = torch.empty_like(x), torch.empty_like(x)
    _norm(x, delta, weight, total, normed, epsilon, add=delta.shape[0] if delta.ndim > x.ndim else 1)
    return total, normed


@on_its_device
def angle_rows(x: Tensor, position: Tensor, frequencies: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines of a rotary embedding, (B, 1, D) in the dtype of x, times `scaling`.

    position (B, 1) int64; frequencies (D / 2,) float32.
    """
    rows, half = position.shape[0], frequencies.shape[0]
    cosines, sines = x.new_empty((2, rows, 1, 2 * half))
    angles_of_row[(rows,)](
        position,
        frequencies,
        cosines,
        sines,
        position.stride(0),
        half,
        scaling,
        BLOCK=triton.next_power_of_2(half),
        INTERPRETED=interpreted(),
        num_warps=1,
    )
    return cosines, sines


def rotate_rows(queries: Tensor, keys: Tensor, cosines: Tensor, sines: Tensor) -> tuple[Tensor, Tensor]:
    """Return both turned: queries (B, Hq, 1, D), keys (B, H, 1, D), tables (B or 1, 1, D)."""
    keys, unturned = rotate_later(queries, keys, cosines, sines)
    return unturned.turned_queries, rotate_now(keys, unturned)


def rotate_later(queries: Tensor, keys: Tensor, cosines: Tensor, sines: Tensor) -> tuple[Tensor, Unturned]:
    """Return the keys as they are, dense in their last dimension, and what is to be done to them and to the queries."""
    queries, keys = in_line(queries), in_line(keys)
    if cosines.stride(-1) != 1 or cosines.stride() != sines.stride():
        cosines, sines = cosines.contiguous(), sines.contiguous()
    turned = queries.new_empty(queries.shape)
    return keys, Unturned(queries=queries, cosines=cosines, sines=sines, turned_queries=turned)


@on_its_device
def rotate_now(keys: Tensor, unturned: Unturned) -> Tensor:
    """Rotate the queries into their place, and return the keys turned."""
    batch, query_heads, _, width = unturned.queries.shape
    key_heads = keys.shape[1]
    turned_keys = keys.new_empty(keys.shape)
    rotate_head[(batch, query_heads + key_heads)](
        unturned.queries,
        keys,
        unturned.cosines,
        unturned.sines,
        unturned.turned_queries,
        turned_keys,
        query_heads,
        key_heads,
        width // 2,
        *unturned.queries.stride()[:2],
        *keys.stride()[:2],
        unturned.table_row,
        BLOCK=triton.next_power_of_2(width // 2),
        num_warps=1,
    )
    return turned_keys


@on_its_device
def _norm(x: Tensor, delta: Tensor, weight: Tensor, total: Tensor, normed: Tensor, epsilon: float, *, add: int) -> None:
    rows, _, width = x.shape
    block = triton.next_power_of_2(width)
    norm_row[(rows,)](
        x, delta, weight, total, normed, width, epsilon, BLOCK=block, ADD=add, num_warps=min(16, max(1, block // 256))
    )
