"""What a decode step does between its matrix products: residual sum with RMSNorm, and rotation, a launch each.

All in float32 and rounded once at the end, where the stock models round in between; only the residual sum is theirs
to the bit, because everything after it starts from it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvbench.kernels.dispatch import on_its_device

# mypy: ignore-errors
# Kernels are written in Triton's language, not Python's.


@triton.jit
def norm_row(x, delta, weight, total, normed, width, epsilon, BLOCK: tl.constexpr, ADD: tl.constexpr):
    """Make a row of total = x + delta, with ADD, and of normed = RMSNorm(total) weight: all (rows, K)."""
    k = tl.arange(0, BLOCK)
    inside = k < width
    at = tl.program_id(0).to(tl.int64) * width + k
    states = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        states += tl.load(delta + at, mask=inside, other=0.0).to(tl.float32)
        states = states.to(total.dtype.element_ty)
        tl.store(total + at, states, mask=inside)
        states = states.to(tl.float32)
    scale = tl.rsqrt(tl.sum(states * states, 0) / width + epsilon)
    out = states * scale * tl.load(weight + k, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + at, out.to(normed.dtype.element_ty), mask=inside)


@triton.jit
def _rotated(states, first, second, cos1, cos2, sin1, sin2, inside):
    x1 = tl.load(states + first, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(states + second, mask=inside, other=0.0).to(tl.float32)
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
    cos1 = tl.load(cosines + row * table_row + d, mask=inside, other=0.0).to(tl.float32)
    cos2 = tl.load(cosines + row * table_row + half + d, mask=inside, other=0.0).to(tl.float32)
    sin1 = tl.load(sines + row * table_row + d, mask=inside, other=0.0).to(tl.float32)
    sin2 = tl.load(sines + row * table_row + half + d, mask=inside, other=0.0).to(tl.float32)
    if head < query_heads:
        at = row * query_row + head * query_head + d
        low, high = _rotated(queries, at, at + half, cos1, cos2, sin1, sin2, inside)
        to = turned_queries + (row * query_heads + head) * 2 * half + d
        tl.store(to, low.to(turned_queries.dtype.element_ty), mask=inside)
        tl.store(to + half, high.to(turned_queries.dtype.element_ty), mask=inside)
    else:
        head -= query_heads
        at = row * key_row + head * key_head + d
        low, high = _rotated(keys, at, at + half, cos1, cos2, sin1, sin2, inside)
        to = turned_keys + (row * key_heads + head) * 2 * half + d
        tl.store(to, low.to(turned_keys.dtype.element_ty), mask=inside)
        tl.store(to + half, high.to(turned_keys.dtype.element_ty), mask=inside)


def norm_rows(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Return RMSNorm(x) weight: x (B, 1, K) contiguous, weight (K,)."""
    normed = torch.empty_like(x)
    _norm(x, x, weight, x, normed, epsilon, add=False)
    return normed


def add_and_norm_rows(x: Tensor, delta: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return x + delta and RMSNorm(x + delta) weight: x, delta (B, 1, K) contiguous, weight (K,)."""
    total, normed = torch.empty_like(x), torch.empty_like(x)
    _norm(x, delta, weight, total, normed, epsilon, add=True)
    return total, normed


@on_its_device
def rotate_rows(queries: Tensor, keys: Tensor, cosines: Tensor, sines: Tensor) -> tuple[Tensor, Tensor]:
    """Return both turned: queries (B, Hq, 1, D), keys (B, H, 1, D), tables (B or 1, 1, D)."""
    queries, keys = (states if states.stride(-1) == 1 else states.contiguous() for states in (queries, keys))
    if cosines.stride(-1) != 1 or cosines.stride() != sines.stride():
        cosines, sines = cosines.contiguous(), sines.contiguous()
    batch, query_heads, _, width = queries.shape
    key_heads = keys.shape[1]
    turned_queries, turned_keys = (states.new_empty(states.shape) for states in (queries, keys))
    rotate_head[(batch, query_heads + key_heads)](
        queries,
        keys,
        cosines,
        sines,
        turned_queries,
        turned_keys,
        query_heads,
        key_heads,
        width // 2,
        queries.stride(0),
        queries.stride(1),
        keys.stride(0),
        keys.stride(1),
        0 if cosines.shape[0] == 1 else cosines.stride(0),
        BLOCK=triton.next_power_of_2(width // 2),
        num_warps=1,
    )
    return turned_queries, turned_keys


@on_its_device
def _norm(
    x: Tensor, delta: Tensor, weight: Tensor, total: Tensor, normed: Tensor, epsilon: float, *, add: bool
) -> None:
    rows, _, width = x.shape
    block = triton.next_power_of_2(width)
    norm_row[(rows,)](
        x, delta, weight, total, normed, width, epsilon, BLOCK=block, ADD=add, num_warps=min(16, max(1, block // 512))
    )
