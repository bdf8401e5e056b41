"""CAKE's division: layers whose attention is spread and moves hold more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvbench.cache import Allocation, Needs, Room, View
from kvbench.cache.parts import split_layers
from kvbench.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Cake(Allocation):
    """A layer's share is its preference H^(1 / tau_spread) V^(1 / tau_shift), of the rows of the prompt's last queries.

    Source: CAKE (arXiv 2503.12491, Eqs. 4 to 6) and its code (cake/model/modify_llama.py): H is the mean entropy of the
    rows, V the variance of each column over the queries, summed over columns; both averaged over the heads, and of
    what is older than these queries only, whose own columns, empty above the diagonal, would be half of V.
    Differs in: the layers are divided once all were seen, where the paper cuts in a cascade so that no more than the
    budget is held meanwhile (its end is the same); the temperatures, which the paper fits to each model, are 1.
    """

    needs: ClassVar[Needs] = Needs.WINDOW
    waits: ClassVar[bool] = True

    tau_spread: float = 1.0
    tau_shift: float = 1.0

    def __post_init__(self) -> None:
        for name in ("tau_spread", "tau_shift"):
            if getattr(self, name) <= 0.0:
                raise ConfigError(f"policy.allocation.{name} is {getattr(self, name):g}; it must be above 0")

    def tell(self, view: View, ranking: Tensor) -> Tensor:
        """Return (B, 1), the preference; rows of pads, which are zero, do not count."""
        rows = view.window.double().masked_fill(~view.valid[:, :, None], 0.0)
        real = rows.sum(dim=-1, keepdim=True) > 0
        count = real.sum(dim=2, keepdim=True).clamp(min=1)
        older = view.position < (view.seen - rows.shape[2])[:, None, None]
        rows = rows.masked_fill(~older[:, :, None], 0.0)
        entropy = -torch.xlogy(rows, rows).sum(dim=(2, 3)) / count[:, :, 0, 0]
        mean = rows.sum(dim=2, keepdim=True) / count
        shift = (((rows - mean) * real) ** 2 / count).sum(dim=(2, 3))
        return (entropy.mean(dim=1) ** (1 / self.tau_spread) * shift.mean(dim=1) ** (1 / self.tau_shift))[:, None]

    def layers(self, room: Room, told: Sequence[Tensor]) -> Sequence[int]:
        """Split what is not protected by preference."""
        return split_layers(torch.cat(list(told)), room)
