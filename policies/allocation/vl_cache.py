"""VL-Cache's division: layers whose attention after the picture is dense hold more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvbench.cache import Allocation, Kind, Needs, Room, View
from kvbench.cache.parts import split_layers
from kvbench.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class VLCache(Allocation):
    """A layer's share is the density of its rows after the picture: how much of a row reaches `share` of its largest.

    Source: VL-Cache (arXiv 2410.23317, Sec. 4.1): an entry counts as attended to from 0.01 of its row's largest on;
    rows are those of the queries after the picture, and layers share the budget by density. Differs in: of those
    queries the last `window_tokens` of the policy are read, and all of them where there is no picture; the least share
    of a layer, 0.01 of the prompt there, is what is protected.
    """

    needs: ClassVar[Needs] = Needs.WINDOW
    waits: ClassVar[bool] = True

    share: float = 0.01

    def __post_init__(self) -> None:
        if not 0.0 < self.share <= 1.0:
            raise ConfigError(f"policy.allocation.share is {self.share:g}; it must lie in (0, 1]")

    def tell(self, view: View, ranking: Tensor) -> Tensor:
        """Return (B, 1), the mean density of the rows over heads and queries."""
        rows = view.window.masked_fill(~view.valid[:, :, None], 0.0)
        largest = rows.amax(dim=-1, keepdim=True)
        picture = torch.where((view.kind == Kind.IMAGE) & view.valid, view.position, -1).amax(dim=(1, 2))
        queries = view.seen[:, None] - torch.arange(rows.shape[2], 0, -1, device=rows.device)
        after = (queries > picture[:, None])[:, None, :, None] & (largest > 0)
        attended = ((rows >= self.share * largest) & (rows > 0)).sum(dim=-1, keepdim=True).double()
        seen = (view.position[:, :, None] >= 0) & (view.position[:, :, None] <= queries[:, None, :, None])
        density = attended / seen.sum(dim=-1, keepdim=True).clamp(min=1)
        return ((density * after).sum(dim=(1, 2)) / after.sum(dim=(1, 2)).clamp(min=1)).double()

    def layers(self, room: Room, told: Sequence[Tensor]) -> Sequence[int]:
        """Split what is not protected by density."""
        return split_layers(torch.cat(list(told)), room)
