"""A few rows times matrices, as a decode step multiplies: every weight is read once, at the bandwidth.

For one row (batch 1) products are summed in float32 without the matrix units, which would idle, and make the RMSNorm
before them and the residual sum after them on the way; up to 64 rows are one tile of the matrix units. One launch
serves several matrices with the same input (queries, keys and values), or gate and up projection with the activation
between, so the weights stay where they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvbench.kernels.decode_step import norm_rows
from kvbench.kernels.dispatch import Norm, interpreted, num_processors, on_its_device, shared_bytes

# mypy: ignore-errors
# Kernels are written in Triton's language, not Python's.

_LONG = 16_384  # rows of a matrix of which the tiles are many whatever their size
_NARROW = 1536  # numbers of an input whose products wait more than they read
_TALL = {"BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4, "WEIGHT_FIRST": True}  # wgmma takes 64 rows, by four warps


@triton.jit
def _one_row(
    x,
    weight,
    other,
    gain,
    epsilon,
    first,
    size,
    width,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN_K: tl.constexpr,
    NORM: tl.constexpr,
    TWO: tl.constexpr,
):
    """X (1, K) times rows `first`.. of weight (size, K), with TWO of another too: (1, BLOCK_N) float32 of each.

    With NORM x is RMSNorm(x) gain: what all is divided by is known at the end.
    """
    n = first + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    at = n[:, None].to(tl.int64) * width + k[None, :]
    sums = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    others = sums
    squares = tl.zeros((BLOCK_K,), tl.float32)
    for start in tl.range(0, width, BLOCK_K, num_stages=STAGES):
        inside = (start + k < width) | EVEN_K
        there = (n < size)[:, None] & inside[None, :]
        a = tl.load(x + start + k, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            squares += a * a
            a *= tl.load(gain + start + k, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(weight + at + start, mask=there, other=0.0, eviction_policy="evict_first")
        sums += w.to(tl.float32) * a[None, :]
        if TWO:
            w = tl.load(other + at + start, mask=there, other=0.0, eviction_policy="evict_first")
            others += w.to(tl.float32) * a[None, :]
    acc, more = tl.sum(sums, 1)[None, :], tl.sum(others, 1)[None, :]
    if NORM:
        scale = tl.rsqrt(tl.sum(squares, 0) / width + epsilon)
        acc *= scale
        more *= scale
    return acc, more


@triton.jit
def _tiles(
    x,
    weight,
    other,
    first,
    size,
    width,
    rows,
    first_row,
    begin,
    end,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRODUCT: tl.constexpr,
    WEIGHT_FIRST: tl.constexpr,
    UPCAST: tl.constexpr,
    TWO: tl.constexpr,
):
    """X (rows, K) from `first_row` on times rows `first`.. of weight (size, K): (BLOCK_M, BLOCK_N) float32.

    Summed are columns `begin` to `end`. With TWO of another weight of that size too, in the same loop. PRODUCT: how a
    product on the matrix units is made of float32 numbers, or "none" for sums without them; WEIGHT_FIRST: which of both
    it takes as rows.
    """
    n = first + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    here = n < size
    if PRODUCT == "none":
        m = first_row + tl.arange(0, BLOCK_M)
        at = n[:, None].to(tl.int64) * width + k[None, :]
        x_at = x + m[:, None] * width + k[None, :]
        sums = tl.zeros((BLOCK_M, BLOCK_N, BLOCK_K), tl.float32)
        others = sums
        for start in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
            inside = (start + k < end) | EVEN_K
            there = here[:, None] & inside[None, :]
            a = tl.load(x_at + start, mask=(m[:, None] < rows) & inside[None, :], other=0.0).to(tl.float32)
            w = tl.load(weight + at + start, mask=there, other=0.0)
            sums += a[:, None, :] * w.to(tl.float32)[None, :, :]
            if TWO:
                w = tl.load(other + at + start, mask=there, other=0.0)
                others += a[:, None, :] * w.to(tl.float32)[None, :, :]
        acc, more = tl.sum(sums, 2), tl.sum(others, 2)
    elif WEIGHT_FIRST:
        m = first_row + tl.arange(0, BLOCK_M)
        at = n[:, None].to(tl.int64) * width + k[None, :]
        x_at = x + m[:, None] * width + k[None, :]
        turned = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        turned_more = turned
        for start in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
            inside = (start + k < end) | EVEN_K
            there = here[:, None] & inside[None, :]
            a = tl.load(x_at + start, mask=(m[:, None] < rows) & inside[None, :], other=0.0)
            w = tl.load(weight + at + start, mask=there, other=0.0, eviction_policy="evict_first")
            if UPCAST:
                a, w = a.to(tl.float32), w.to(tl.float32)
            turned = tl.dot(w, tl.trans(a), turned, input_precision=PRODUCT)
            if TWO:
                w = tl.load(other + at + start, mask=there, other=0.0, eviction_policy="evict_first")
                if UPCAST:
                    w = w.to(tl.float32)
                turned_more = tl.dot(w, tl.trans(a), turned_more, input_precision=PRODUCT)
        acc, more = tl.trans(turned), tl.trans(turned_more)
    else:
        m = first_row + tl.arange(0, BLOCK_M)
        at = n[None, :].to(tl.int64) * width + k[:, None]
        x_at = x + m[:, None] * width + k[None, :]
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        more = acc
        for start in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
            inside = (start + k < end) | EVEN_K
            there = here[None, :] & inside[:, None]
            a = tl.load(x_at + start, mask=(m[:, None] < rows) & inside[None, :], other=0.0)
            w = tl.load(weight + at + start, mask=there, other=0.0, eviction_policy="evict_first")
            if UPCAST:
                a, w = a.to(tl.float32), w.to(tl.float32)
            acc = tl.dot(a, w, acc, input_precision=PRODUCT)
            if TWO:
                w = tl.load(other + at + start, mask=there, other=0.0, eviction_policy="evict_first")
                if UPCAST:
                    w = w.to(tl.float32)
                more = tl.dot(a, w, more, input_precision=PRODUCT)
    return acc, more


@triton.jit
def _store(
    acc,
    bias,
    before,
    out,
    first,
    size,
    rows,
    first_row,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ADD: tl.constexpr,
):
    """Write a tile (BLOCK_M, BLOCK_N) of out (rows, size), with ADD the sum of it, rounded, and of `before`."""
    n = first + tl.arange(0, BLOCK_N)
    m = first_row + tl.arange(0, BLOCK_M)
    if HAS_BIAS:
        acc += tl.load(bias + n, mask=n < size, other=0.0).to(tl.float32)[None, :]
    inside = (m[:, None] < rows) & (n[None, :] < size)
    at = m[:, None] * size + n[None, :]
    acc = acc.to(out.dtype.element_ty)
    if ADD:
        acc = (acc.to(tl.float32) + tl.load(before + at, mask=inside, other=0.0).to(tl.float32)).to(acc.dtype)
    tl.store(out + at, acc, mask=inside)


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
    gain,
    before,
    width,
    rows,
    epsilon,
    part,
    MATRICES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRODUCT: tl.constexpr,
    WEIGHT_FIRST: tl.constexpr,
    UPCAST: tl.constexpr,
    PARTS: tl.constexpr,
    NORM: tl.constexpr,
    ADD: tl.constexpr,
):
    """Write outputs (rows, n) of up to three weights (n, K) with one input (rows, K); one program, one tile.

    With ADD `before` (rows, n) is added. Of several PARTS each sums `part` columns: outputs are (PARTS, rows, n).
    """
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
    first, row = tile * BLOCK_N, tl.program_id(1) * BLOCK_M
    if BLOCK_M == 1:
        acc, _ = _one_row(
            x, weight, x, gain, epsilon, first, size, width, BLOCK_N, BLOCK_K, STAGES, EVEN_K, NORM, False
        )
    else:
        begin, end = 0, width
        if PARTS > 1:
            begin = tl.program_id(2) * part
            end = tl.minimum(begin + part, width)
            out += tl.program_id(2) * rows * size
        acc, _ = _tiles(
            x,
            weight,
            x,
            first,
            size,
            width,
            rows,
            row,
            begin,
            end,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            STAGES,
            EVEN_K,
            PRODUCT,
            WEIGHT_FIRST,
            UPCAST,
            False,
        )
    _store(acc, bias, before, out, first, size, rows, row, BLOCK_M, BLOCK_N, HAS_BIAS, ADD)


@triton.jit
def gate_up(
    x,
    gate,
    up,
    out,
    gain,
    size,
    width,
    rows,
    epsilon,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRODUCT: tl.constexpr,
    WEIGHT_FIRST: tl.constexpr,
    UPCAST: tl.constexpr,
    NORM: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """silu(x gate^T) * (x up^T): x (rows, K), gate and up (size, K), out (rows, size)."""
    first, row = tl.program_id(0) * BLOCK_N, tl.program_id(1) * BLOCK_M
    if BLOCK_M == 1:
        g, u = _one_row(
            x, gate, up, gain, epsilon, first, size, width, BLOCK_N, BLOCK_K, STAGES, EVEN_K, NORM, TOGETHER
        )
        if not TOGETHER:
            u, _ = _one_row(x, up, x, gain, epsilon, first, size, width, BLOCK_N, BLOCK_K, STAGES, EVEN_K, NORM, False)
    else:
        g, u = _tiles(
            x,
            gate,
            up,
            first,
            size,
            width,
            rows,
            row,
            0,
            width,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            STAGES,
            EVEN_K,
            PRODUCT,
            WEIGHT_FIRST,
            UPCAST,
            TOGETHER,
        )
        if not TOGETHER:
            u, _ = _tiles(
                x,
                up,
                x,
                first,
                size,
                width,
                rows,
                row,
                0,
                width,
                BLOCK_M,
                BLOCK_N,
                BLOCK_K,
                STAGES,
                EVEN_K,
                PRODUCT,
                WEIGHT_FIRST,
                UPCAST,
                False,
            )
    _store(g * tl.sigmoid(g) * u, x, x, out, first, size, rows, row, BLOCK_M, BLOCK_N, False, False)


@on_its_device
def project_rows(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    *,
    norm: Norm | None = None,
    before: Tensor | None = None,
    in_parts: bool = False,
) -> list[Tensor]:
    """Return x (B, 1, K) times each of one to three weights (N, K), each (B, 1, N); all have a bias or none has.

    norm: what is done to x before. before (B, 1, N): what the output of one weight is added to. in_parts: one weight
    without a bias may leave float32 (P, B, 1, N) that whoever takes it adds up.
    """
    rows, _, width = x.shape
    if norm is not None and rows > 1:
        x, norm = norm_rows(x, norm.weight, norm.epsilon), None
    sizes = [weight.shape[0] for weight in weights]
    block = _blocks(x, sizes, in_parts=in_parts and biases[0] is None and before is None)
    parts = block["PARTS"]
    if parts > 1:
        outputs = [x.new_empty((parts, rows, 1, size), dtype=torch.float32) for size in sizes]
    else:
        outputs = [x.new_empty((rows, 1, size)) for size in sizes]
    tiles = sum(triton.cdiv(size, block["BLOCK_N"]) for size in sizes)
    given = (weights, [weights[0] if bias is None else bias for bias in biases], outputs, sizes)
    in_threes = [item for items in given for item in (*items, *[items[0]] * (3 - len(items)))]
    project[(tiles, triton.cdiv(rows, block["BLOCK_M"]), parts)](
        x,
        *in_threes,
        x if norm is None else norm.weight,
        x if before is None else before,
        width,
        rows,
        0.0 if norm is None else norm.epsilon,
        triton.cdiv(width, parts * block["BLOCK_K"]) * block["BLOCK_K"],
        MATRICES=len(weights),
        HAS_BIAS=biases[0] is not None,
        NORM=norm is not None,
        ADD=before is not None,
        **block,
    )
    return outputs


@on_its_device
def gated_rows(x: Tensor, gate: Tensor, up: Tensor, norm: Norm | None = None) -> Tensor:
    """Return silu(x gate^T) * (x up^T), (B, 1, N): x (B, 1, K), gate and up (N, K); norm: what is done to x before."""
    rows, _, width = x.shape
    if norm is not None and rows > 1:
        x, norm = norm_rows(x, norm.weight, norm.epsilon), None
    size = gate.shape[0]
    out = x.new_empty((rows, 1, size))
    block = _blocks(x, (size, size))
    del block["PARTS"]
    grid = triton.cdiv(size, block["BLOCK_N"]), triton.cdiv(rows, block["BLOCK_M"])
    gain, epsilon = (x, 0.0) if norm is None else norm
    gate_up[grid](
        x, gate, up, out, gain, size, width, rows, epsilon, NORM=norm is not None, TOGETHER=_reads_together(x), **block
    )
    return out


def _blocks(x: Tensor, sizes: Sequence[int], *, in_parts: bool = False) -> dict[str, int | str]:
    """Tiles measured on an H200 (docs/log.md) for one matrix alone, a long one as of a vocabulary, two, or three.

    in_parts: one alone may be summed in several PARTS.

    Not measured: float32 at 2 to 15 rows and above 16.
    """
    rows, _, width = x.shape
    is_long, is_narrow = sizes[0] > _LONG, width <= _NARROW
    parts = _parts(sizes[0], x) if in_parts and not is_long and not is_narrow else 1
    if x.dtype == torch.float32:
        tile = _float32_tile(rows, len(sizes), is_long, is_narrow=is_narrow)
    elif rows == 1:
        tile = {"PRODUCT": "none"} | _one_row_tile(len(sizes), is_narrow=is_narrow)
    elif rows > 16:
        tile = _many_rows_tile(rows, len(sizes), is_long, parts, is_narrow=is_narrow)
    elif is_narrow:
        tile = _narrow_tile(len(sizes), is_long)
    else:
        tile = _wide_tile(x, sizes, is_long, parts)
    tile = {"BLOCK_M": 1 if rows == 1 else max(16, triton.next_power_of_2(rows)), "PRODUCT": "ieee"} | tile
    tile = {"PARTS": 1, "WEIGHT_FIRST": False} | tile
    together = 2 if len(sizes) == 2 and _reads_together(x) else 1
    stage_bytes = (together * tile["BLOCK_N"] + tile["BLOCK_M"]) * tile["BLOCK_K"] * x.element_size()
    tile["STAGES"] = max(1, min(tile["STAGES"], shared_bytes(x.device) // stage_bytes))  # other GPUs have less
    return tile | {"EVEN_K": width % (tile["BLOCK_K"] * tile["PARTS"]) == 0, "UPCAST": interpreted()}


def _parts(size: int, x: Tensor) -> int:
    """Return in how many parts a product of `size` rows, 64 a tile, leaves the fewest processors idle.

    Of two that are nearly alike the fewer, which are added up sooner.
    """

    def rounds_per_wanted(parts: int) -> float:
        wanted = triton.cdiv(size, 64) * parts / num_processors(x.device)
        return round(math.ceil(wanted) / wanted, 2)

    return min((2, 4), key=rounds_per_wanted)


def _reads_together(x: Tensor) -> bool:
    """Whether gate and up are read in one loop: in float32, whose numbers are long, both would fill a processor."""
    return x.shape[-1] <= _NARROW or x.dtype != torch.float32


def _one_row_tile(num_matrices: int, *, is_narrow: bool) -> dict[str, int | str]:
    if num_matrices == 1:
        return {"BLOCK_N": 8, "BLOCK_K": 256, "STAGES": 6, "num_warps": 2}
    if num_matrices == 2 and not is_narrow:
        return {"BLOCK_N": 4, "BLOCK_K": 512, "STAGES": 6, "num_warps": 2}
    if not is_narrow:
        return {"BLOCK_N": 16, "BLOCK_K": 256, "STAGES": 4, "num_warps": 2}
    return {"BLOCK_N": 8, "BLOCK_K": 256, "STAGES": 4, "num_warps": 1}


def _narrow_tile(num_matrices: int, is_long: bool) -> dict[str, int | str]:
    """Return tiles of a small model, whose products have little to read and little to fill a device with."""
    if is_long:
        return {"BLOCK_N": 32, "BLOCK_K": 64, "STAGES": 9, "num_warps": 2}
    return {
        1: {"BLOCK_N": 16, "BLOCK_K": 128, "STAGES": 5, "num_warps": 4},
        2: {"BLOCK_N": 8, "BLOCK_K": 128, "STAGES": 5, "num_warps": 2},
        3: {"BLOCK_N": 16, "BLOCK_K": 64, "STAGES": 8, "num_warps": 1},
    }[num_matrices]


def _wide_tile(x: Tensor, sizes: Sequence[int], is_long: bool, parts: int) -> dict[str, int | str]:
    if is_long:
        return {"BLOCK_N": 16, "BLOCK_K": 256, "STAGES": 5, "num_warps": 2}
    if len(sizes) == 1 and parts == 1:  # more and smaller tiles keep all busy
        return {"BLOCK_N": 16, "BLOCK_K": 128, "STAGES": 6, "num_warps": 2}
    programs = parts * sum(triton.cdiv(size, 64) for size in (sizes[:1] if len(sizes) == 2 else sizes))
    return {"STAGES": 5 if programs <= num_processors(x.device) else 3, "PARTS": parts} | _TALL


def _many_rows_tile(
    rows: int, num_matrices: int, is_long: bool, parts: int, *, is_narrow: bool
) -> dict[str, int | str]:
    if num_matrices == 1 and is_long:
        return {"BLOCK_N": 64, "BLOCK_K": 128, "STAGES": 3, "num_warps": 8}
    if parts > 1:
        return {"STAGES": 4 if rows <= 32 else 6, "PARTS": parts} | _TALL
    if num_matrices == 1:
        tile = {"BLOCK_N": 32, "BLOCK_K": 128, "num_warps": 4} if rows > 32 else {"BLOCK_N": 16, "BLOCK_K": 256}
        return {"STAGES": 5, "num_warps": 2} | tile
    if num_matrices == 2 and not is_narrow:
        tile = {"BLOCK_N": 64, "BLOCK_K": 64, "STAGES": 4, "num_warps": 4}
        return tile if rows > 32 else {"BLOCK_N": 32, "BLOCK_K": 128, "STAGES": 3, "num_warps": 2}
    if num_matrices == 3 and not is_narrow:
        return {"STAGES": 6 if rows > 32 else 4} | _TALL | ({"BLOCK_K": 64} if rows > 32 else {})
    tile = {"BLOCK_N": 64, "BLOCK_K": 64} if rows > 32 else {"BLOCK_N": 32, "BLOCK_K": 128}
    return {"STAGES": 5, "num_warps": 4} | tile


def _float32_tile(rows: int, num_matrices: int, is_long: bool, *, is_narrow: bool) -> dict[str, int | str]:
    """Return tiles of few rows, summed without the matrix units, whose numbers are shorter.

    Where there is much to do, products are made of three of theirs: no further from float64 than the library's.
    """
    if rows == 1:
        return {"BLOCK_N": 4, "BLOCK_K": 256, "STAGES": 4, "num_warps": 2}
    if is_long:
        return {"BLOCK_N": 64, "BLOCK_K": 64, "STAGES": 3, "num_warps": 4, "PRODUCT": "tf32x3"}
    if rows > 16:
        return {"BLOCK_N": 32, "BLOCK_K": 64, "STAGES": 4, "num_warps": 4, "PRODUCT": "tf32x3"}
    if is_narrow and num_matrices != 2:
        shape = {"BLOCK_M": 4, "BLOCK_N": 4, "num_warps": 1}
        shape |= {"BLOCK_K": 128, "STAGES": 3} if num_matrices == 1 else {"BLOCK_K": 64, "STAGES": 4}
    elif num_matrices == 1:
        shape = {"BLOCK_M": 16, "BLOCK_N": 2, "BLOCK_K": 128, "STAGES": 3, "num_warps": 2}
    else:
        shape = {"BLOCK_M": 8, "BLOCK_N": 4, "BLOCK_K": 64, "STAGES": 3, "num_warps": 1}
    return shape | {"BLOCK_M": min(shape["BLOCK_M"], triton.next_power_of_2(rows)), "PRODUCT": "none"}
