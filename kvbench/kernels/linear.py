"""Matrix times a few vectors, as a decode step needs it: every weight is read once, at the bandwidth.

For one row (batch 1) products are summed in float32 without the matrix units, which would idle; up to
64 rows are one tile of them. One launch serves several matrices with the same input (queries, keys and
values), or gate and up projection with the activation between, so the weights stay where they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from kvbench.kernels.dispatch import interpreted, on_its_device

# mypy: ignore-errors
# Kernels are written in Triton's language, not Python's.


@triton.jit
def _tile(
    x,
    weight,
    first,
    size,
    width,
    rows,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """X (rows, K) times rows `first`.. of weight (size, K): (BLOCK_M, BLOCK_N) float32; BLOCK_M 1 is one row."""
    n = first + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    here = n < size
    if BLOCK_M == 1:
        at = weight + n[:, None].to(tl.int64) * width + k[None, :]
        sums = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for start in tl.range(0, width, BLOCK_K, num_stages=STAGES):
            inside = (start + k < width) | EVEN_K
            a = tl.load(x + start + k, mask=inside, other=0.0)
            w = tl.load(at + start, mask=here[:, None] & inside[None, :], other=0.0, eviction_policy="evict_first")
            sums += w.to(tl.float32) * a.to(tl.float32)[None, :]
        acc = tl.sum(sums, 1)[None, :]
    else:
        m = tl.arange(0, BLOCK_M)
        w_at = weight + n[None, :].to(tl.int64) * width + k[:, None]
        x_at = x + m[:, None] * width + k[None, :]
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in tl.range(0, width, BLOCK_K, num_stages=STAGES):
            inside = (start + k < width) | EVEN_K
            a = tl.load(x_at + start, mask=(m[:, None] < rows) & inside[None, :], other=0.0)
            w = tl.load(w_at + start, mask=here[None, :] & inside[:, None], other=0.0, eviction_policy="evict_first")
            if UPCAST:
                a = a.to(tl.float32)
                w = w.to(tl.float32)
            acc = tl.dot(a, w, acc, input_precision="ieee")
    return acc


@triton.jit
def _store(acc, bias, out, first, size, rows, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_BIAS: tl.constexpr):
    n = first + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    if HAS_BIAS:
        acc += tl.load(bias + n, mask=n < size, other=0.0).to(tl.float32)[None, :]
    inside = (m[:, None] < rows) & (n[None, :] < size)
    tl.store(out + m[:, None] * size + n[None, :], acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def project(
    x,
    w0,
    w1,
    w2,
    b0,
    b1,
    b2,
    o0,
    o1,
    o2,
    n0,
    n1,
    n2,
    width,
    rows,
    MATRICES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Write outputs (rows, n) of up to three weights (n, K) with one input (rows, K); one program, one tile."""
    tile = tl.program_id(0)
    weight, bias, out, size = w0, b0, o0, n0
    if MATRICES > 1:  # one loop for all: three would take three times the shared memory
        tiles0 = tl.cdiv(n0, BLOCK_N)
        tiles1 = tl.cdiv(n1, BLOCK_N)
        if tile >= tiles0 + tiles1:
            weight, bias, out, size = w2, b2, o2, n2
            tile -= tiles0 + tiles1
        elif tile >= tiles0:
            weight, bias, out, size = w1, b1, o1, n1
            tile -= tiles0
    first = tile * BLOCK_N
    acc = _tile(x, weight, first, size, width, rows, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, EVEN_K, UPCAST)
    _store(acc, bias, out, first, size, rows, BLOCK_M, BLOCK_N, HAS_BIAS)


@triton.jit
def gate_up(
    x,
    gate,
    up,
    out,
    size,
    width,
    rows,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """silu(x gate^T) * (x up^T): x (rows, K), gate and up (size, K), out (rows, size)."""
    first = tl.program_id(0) * BLOCK_N
    g = _tile(x, gate, first, size, width, rows, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, EVEN_K, UPCAST)
    u = _tile(x, up, first, size, width, rows, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, EVEN_K, UPCAST)
    _store(g * tl.sigmoid(g) * u, x, out, first, size, rows, BLOCK_M, BLOCK_N, False)


@on_its_device
def project_rows(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    """Return x (B, 1, K) times each of one to three weights (N, K), each (B, 1, N); all have a bias or none has."""
    rows, _, width = x.shape
    sizes = [weight.shape[0] for weight in weights]
    outputs = [x.new_empty((rows, 1, size)) for size in sizes]
    block = _blocks(rows, width, few=len(weights) == 1)
    tiles = sum(triton.cdiv(size, block["BLOCK_N"]) for size in sizes)
    given = (weights, [weights[0] if bias is None else bias for bias in biases], outputs, sizes)
    in_threes = [item for items in given for item in (*items, *[items[0]] * (3 - len(items)))]
    project[(tiles,)](x, *in_threes, width, rows, MATRICES=len(weights), HAS_BIAS=biases[0] is not None, **block)
    return outputs


@on_its_device
def gated_rows(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(x gate^T) * (x up^T), (B, 1, N): x (B, 1, K), gate and up (N, K)."""
    rows, _, width = x.shape
    size = gate.shape[0]
    out = x.new_empty((rows, 1, size))
    block = _blocks(rows, width, few=False)
    gate_up[(triton.cdiv(size, block["BLOCK_N"]),)](x, gate, up, out, size, width, rows, **block)
    return out


def _blocks(rows: int, width: int, *, few: bool) -> dict[str, int]:
    """Tiles measured on an H200 (docs/log.md); `few`: one matrix alone, where more and smaller tiles keep all busy."""
    if rows == 1:
        shape = {"BLOCK_M": 1, "BLOCK_N": 8, "BLOCK_K": 256}
        shape |= {"STAGES": 6, "num_warps": 2} if few else {"STAGES": 4, "num_warps": 1}
    else:
        shape = {"BLOCK_M": max(16, triton.next_power_of_2(rows))}
        if few:
            shape |= {"BLOCK_N": 16, "BLOCK_K": 256, "STAGES": 5, "num_warps": 2}
        else:
            shape |= {"BLOCK_N": 32, "BLOCK_K": 128, "STAGES": 5, "num_warps": 4}
    return shape | {"EVEN_K": width % shape["BLOCK_K"] == 0, "UPCAST": interpreted()}
