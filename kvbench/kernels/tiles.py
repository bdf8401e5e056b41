"""Block sizes of the attention kernels, and the one tile of logits they all start from.

Sizes are constants by dtype and head size: no search at run time, so results and warm-up do not
depend on what ran before.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvbench.kernels.dispatch import interpreted


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiles:
    """Queries and keys of one tile, warps of a program, and loads in flight."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


_HALF = {
    64: Tiles(block_q=64, block_k=128, num_warps=4, num_stages=3),
    128: Tiles(block_q=64, block_k=128, num_warps=4, num_stages=3),
    256: Tiles(block_q=64, block_k=64, num_warps=4, num_stages=2),
}
_SINGLE = {
    64: Tiles(block_q=32, block_k=64, num_warps=4, num_stages=2),
    128: Tiles(block_q=32, block_k=64, num_warps=4, num_stages=2),
    256: Tiles(block_q=32, block_k=32, num_warps=4, num_stages=1),
}


def tiles_for(query: Tensor) -> Tiles:
    """Return the block sizes for queries (B, Hq, Q, D)."""
    table = _SINGLE if query.dtype == torch.float32 else _HALF
    return next(tiles for width, tiles in table.items() if query.shape[-1] <= width)


def row_tiles_for(query: Tensor) -> Tiles:
    """Return the block sizes of the walk over keys: in float32 smaller, because its rows do not fit registers else."""
    if query.dtype != torch.float32:
        return tiles_for(query)
    wide = query.shape[-1] > 128
    return Tiles(block_q=16 if wide else 32, block_k=32, num_warps=4 if wide else 8, num_stages=1 if wide else 2)


def padded_width(width: int) -> int:
    """Return the power of two, at least 16, that holds a head."""
    return max(16, int(triton.next_power_of_2(width)))


def upcast(states: Tensor) -> bool:
    """Return whether operands must be float32 before a product: numpy, which interprets, has no bfloat16."""
    return interpreted() and states.dtype != torch.float32


def rows_in_line(states: Tensor) -> Tensor:
    """Return `states` with heads whose numbers lie side by side, which kernels rely on; a copy only if they do not."""
    return states if states.stride(-1) == 1 else states.contiguous()


@triton.jit
def tile_logits(left, right, scale, UPCAST: tl.constexpr):
    """Return left (M, D) times right (D, N) times scale, accumulated in float32, never in TF32."""
    if UPCAST:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, input_precision="ieee") * scale
