"""A layer's slots as the kernels see them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SlotColumns:
    """A layer's slots as the kernels see them, all contiguous and changed in place.

    keys, values (B, H, C, D); position (B, H, C) int64, kind int8, mass float32 or None, rank int32 or
    None; length and free (B, H) int64; faults (B, H) int32.
    """

    keys: Tensor
    values: Tensor
    position: Tensor
    kind: Tensor
    mass: Tensor | None
    rank: Tensor | None
    length: Tensor
    free: Tensor
    faults: Tensor
