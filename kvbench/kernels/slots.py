"""Launch the kernels that write a token into its slot and free the victim's."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from kvbench.kernels.slot_columns import SlotColumns
from kvbench.kernels.slot_kernels import free_victim, write_token

_BLOCK_SLOTS = 512


def write_slot(columns: SlotColumns, keys: Tensor, values: Tensor, seen: Tensor, *, advance: bool) -> None:
    """Put one token, (B, H, 1, D), at position `seen` - 1 into the free slots; `advance` frees the next slot."""
    batch, heads, capacity, width = columns.keys.shape
    write_token[(batch * heads,)](
        keys,
        values,
        columns.keys,
        columns.values,
        columns.position,
        columns.kind,
        columns.position if columns.mass is None else columns.mass,
        columns.position if columns.rank is None else columns.rank,
        columns.length,
        columns.free,
        seen,
        heads,
        capacity,
        width,
        keys.stride(0),
        keys.stride(1),
        values.stride(0),
        values.stride(1),
        BLOCK_D=triton.next_power_of_2(width),
        HAS_MASS=columns.mass is not None,
        HAS_RANK=columns.rank is not None,
        ADVANCE=advance,
        num_warps=1,
    )


def free_lowest(columns: SlotColumns, score: Tensor, budget: Tensor, sinks: Tensor, recent_from: Tensor) -> None:
    """Free the entry of lowest `score` (B, 1 or H, C) of each head over its `budget` (B,), the oldest of equals.

    Entries at positions below `sinks` (B,) or from `recent_from` (B,) on are protected. NaN of another entry
    is noted in the faults and counts as a large score.
    """
    _free(columns, score, columns.free, budget, sinks, recent_from, given=False)


def lowest_slot(columns: SlotColumns, score: Tensor, budget: Tensor, sinks: Tensor, recent_from: Tensor) -> Tensor:
    """Return (B, H) int64: the slot that `free_lowest` would free were every head over its budget; frees nothing."""
    victim = torch.empty_like(columns.free)
    _free(columns, score, victim, budget, sinks, recent_from, given=False, apply=False)
    return victim


def free_given(columns: SlotColumns, victim: Tensor, budget: Tensor) -> None:
    """Free slot `victim` (B, H) int64 of each head over its `budget` (B,).

    One that is no slot with a token is noted in the faults, and slot 0 is freed.
    """
    _free(columns, columns.position, victim, budget, budget, budget, given=True)


def _free(
    columns: SlotColumns,
    score: Tensor,
    victim: Tensor,
    budget: Tensor,
    sinks: Tensor,
    recent_from: Tensor,
    *,
    given: bool,
    apply: bool = True,
) -> None:
    batch, heads, capacity = columns.position.shape
    score = score if score.stride(-1) == 1 else score.contiguous()
    free_victim[(batch * heads,)](
        score,
        victim,
        columns.position,
        columns.position if columns.rank is None else columns.rank,
        columns.length,
        columns.free,
        columns.faults,
        budget,
        sinks,
        recent_from,
        heads,
        capacity,
        score.stride(0),
        0 if score.shape[1] == 1 else score.stride(1),
        BLOCK_C=_BLOCK_SLOTS,
        GIVEN=given,
        HAS_RANK=columns.rank is not None,
        APPLY=apply,
        num_warps=1 if given else 4,  # nothing waits between reading a length and writing it, so one warp does both
    )
