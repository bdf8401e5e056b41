"""Launch the decode step's matrix products."""

from __future__ import annotations

from collections.abc import Sequence

import triton
from torch import Tensor

from kvbench.kernels.dispatch import interpreted
from kvbench.kernels.linear_kernels import gate_up, project


def project_rows(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    """Return x (B, 1, K) times each of one to three weights (N, K), each (B, 1, N); all have a bias or none has."""
    rows, _, width = x.shape
    sizes = [weight.shape[0] for weight in weights]
    outputs = [x.new_empty((rows, 1, size)) for size in sizes]
    block = _blocks(rows, width)
    tiles = sum(triton.cdiv(size, block["BLOCK_N"]) for size in sizes)
    project[(tiles,)](
        x,
        *_three(weights),
        *_three([weights[0] if bias is None else bias for bias in biases]),
        *_three(outputs),
        *_three(sizes),
        width,
        rows,
        MATRICES=len(weights),
        HAS_BIAS=biases[0] is not None,
        **block,
        num_warps=_num_warps(rows),
    )
    return outputs


def gated_rows(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(x gate^T) * (x up^T), (B, 1, N): x (B, 1, K), gate and up (N, K)."""
    rows, _, width = x.shape
    size = gate.shape[0]
    out = x.new_empty((rows, 1, size))
    block = _blocks(rows, width)
    tiles = triton.cdiv(size, block["BLOCK_N"])
    gate_up[(tiles,)](x, gate, up, out, size, width, rows, **block, num_warps=_num_warps(rows))
    return out


def _three(items: Sequence[object]) -> list[object]:
    return [*items, *[items[0]] * (3 - len(items))]


def _blocks(rows: int, width: int) -> dict[str, int]:
    """Tiles measured on an H100: 8 x 256 for one row, 32 x 128 for more (docs/log.md)."""
    if rows == 1:
        shape = {"BLOCK_M": 1, "BLOCK_N": 8, "BLOCK_K": 256, "STAGES": 6}
    else:
        shape = {"BLOCK_M": max(16, triton.next_power_of_2(rows)), "BLOCK_N": 32, "BLOCK_K": 128, "STAGES": 5}
    return shape | {"EVEN_K": width % shape["BLOCK_K"] == 0, "UPCAST": interpreted()}


def _num_warps(rows: int) -> int:
    return 2 if rows == 1 else 4
