"""D2O's division: the first two layers and the last are left whole, of the others the denser ones hold more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvbench.cache import Allocation, Needs, Room, View
from kvbench.cache.parts import split, split_layers
from kvbench.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class D2O(Allocation):
    """Layers 0, 1 and the last stay uncut; a layer's share of the rest falls with the variance of its column sums.

    Its weight is exp(-F): F is the variance, over the tokens, of the attention that each received, scaled to [0, 1]
    over the heads of the layer, their mean.

    Source: D2O (arXiv 2406.13035, Sec. 3.2) and its release (AIoT-MLSys-Lab/D2O at 12c99d8), whose scaling this is.
    Differs in: the three layers are paid for by the others, where the release holds them on top of the budget; where
    those would have less than `others_fraction` of the uniform budget on average, the three get what leaves them that;
    heads are KV heads, each the mean of its query heads; the release's least share, 0.01 of the prompt, is what is
    protected.
    """

    needs: ClassVar[Needs] = Needs.MASS
    waits: ClassVar[bool] = True

    others_fraction: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 <= self.others_fraction <= 1.0:
            raise ConfigError(f"policy.allocation.others_fraction is {self.others_fraction:g}; it must lie in [0, 1]")

    def tell(self, view: View, ranking: Tensor) -> Tensor:
        """Return (B, 1), the mean scaled variance."""
        number = view.valid.sum(dim=-1)
        mass = view.mass.double().masked_fill(~view.valid, 0.0)
        mean = mass.sum(dim=-1) / number.clamp(min=1)
        spread = ((mass - mean[..., None]).masked_fill(~view.valid, 0.0) ** 2).sum(dim=-1) / (number - 1).clamp(min=1)
        least, most = spread.amin(dim=-1, keepdim=True), spread.amax(dim=-1, keepdim=True)
        return ((spread - least) / (most - least + 1e-6)).mean(dim=-1, keepdim=True)

    def layers(self, room: Room, told: Sequence[Tensor]) -> Sequence[int]:
        """Give the three what the others can pay, and split the rest."""
        whole = sorted({0, min(1, room.num_layers - 1), room.num_layers - 1})
        others = [layer for layer in range(room.num_layers) if layer not in whole]
        weight = torch.exp(-torch.cat(list(told)))
        if not others:
            return split_layers(weight, room)
        total = room.num_layers * room.budget
        left = max(room.protected, int(self.others_fraction * room.budget)) * len(others)
        each = min(room.tokens, (total - left) // len(whole))
        rest = total - each * len(whole)
        shares = dict.fromkeys(whole, each)
        shares |= dict(zip(others, self._split(weight[others], room, rest), strict=True))
        return [shares[layer] for layer in range(room.num_layers)]

    def _split(self, weight: Tensor, room: Room, total: int) -> list[int]:
        """Return entries that add up to `total`, what is protected and by weight a share of the rest."""
        most = torch.full(weight.shape, room.tokens - room.protected)
        free = torch.tensor(total - room.protected * len(weight))
        return [room.protected + share for share in split(weight, free, most).tolist()]
