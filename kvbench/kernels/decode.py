"""Launch decode attention over slots: workspaces, block sizes, and how many parts the slots are cut into."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor

from kvbench.kernels.decode_kernel import attend_part, join_parts
from kvbench.kernels.dispatch import interpreted

_BLOCK_SLOTS, _STAGES = 64, 3
_TURN_SLOTS, _TURN_STAGES = 32, 3  # turning takes registers and shared memory
_JOIN_SLOTS = 1024
_MAX_PARTS = 64
_PROGRAMS_PER_PROCESSOR = 4


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What turning stored keys to their ranks needs: position and rank (B, H, C), seen (B,), tables (P, D / 2)."""

    position: Tensor
    rank: Tensor
    seen: Tensor
    cosines: Tensor
    sines: Tensor


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
) -> tuple[Tensor, Tensor | None]:
    """Return output (B, Hq, 1, D) and probabilities (B, H, C) float32 or None; `mass` grows in place.

    query (B, Hq, 1, D) with a dense last dimension; keys, values (B, H, C, D) contiguous; length (B, H)
    int64: the first slots of each head hold tokens. With `turn`, query and keys are taken at their ranks.
    """
    batch, heads, capacity, width = keys.shape
    group = query.shape[1] // heads
    pairs = batch * heads
    block_slots, stages = (_TURN_SLOTS, _TURN_STAGES) if turn else (_BLOCK_SLOTS, _STAGES)
    parts = _num_parts(pairs, triton.cdiv(capacity, block_slots), query.device)
    new = query.new_empty
    partial = new((pairs, parts, group, width), dtype=torch.float32)
    peaks, sums = new((2, pairs, parts, group), dtype=torch.float32)
    want_rows = mass is not None or want_probs
    logits = new((pairs, group, capacity), dtype=torch.float32) if want_rows else partial
    probs = new((batch, heads, capacity), dtype=torch.float32) if want_probs else None
    output = new((batch, heads * group, 1, width))
    block_d = max(32 if turn else 16, triton.next_power_of_2(width))  # a product sums over 16 numbers at least
    attend_part[(pairs, parts)](
        query,
        keys,
        values,
        length,
        turn.seen if turn else length,
        turn.position if turn else length,
        turn.rank if turn else length,
        turn.cosines if turn else partial,
        turn.sines if turn else partial,
        partial,
        peaks,
        sums,
        logits,
        scaling,
        heads,
        capacity,
        width,
        query.stride(0),
        query.stride(1),
        PARTS=parts,
        GROUP=group,
        BLOCK_G=max(16, triton.next_power_of_2(group)),
        BLOCK_C=block_slots,
        BLOCK_D=block_d,
        WANT_LOGITS=want_rows,
        TURN=turn is not None,
        UPCAST=interpreted(),
        num_warps=4,
        num_stages=stages,
    )
    join_parts[(pairs, triton.cdiv(capacity, _JOIN_SLOTS) if want_rows else 1)](
        partial,
        peaks,
        sums,
        logits,
        length,
        output,
        partial if mass is None else mass,
        partial if probs is None else probs,
        capacity,
        width,
        PARTS=parts,
        GROUP=group,
        BLOCK_P=triton.next_power_of_2(parts),
        BLOCK_C=_JOIN_SLOTS,
        BLOCK_D=block_d,
        REDUCTION=reduction,
        ADD_MASS=mass is not None,
        WANT_PROBS=want_probs,
        num_warps=4,
    )
    return output, probs


def _num_parts(pairs: int, blocks: int, device: torch.device) -> int:
    """Enough programs to fill the device, a power of two, and at least one of the `blocks` of slots for each."""
    wanted = _PROGRAMS_PER_PROCESSOR * _num_processors(device) / pairs
    parts = 1
    while parts < wanted and 2 * parts <= min(blocks, _MAX_PARTS):
        parts *= 2
    return parts


@cache
def _num_processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
