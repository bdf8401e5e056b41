"""One threshold for a whole model: the best entries of all layers and heads stay, wherever they lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvbench.cache import Allocation, Room, View
from kvbench.cache.parts import best_of_layer, split_layers


@dataclass(frozen=True, kw_only=True)
class GlobalThreshold(Allocation):
    """Rank the candidates of all layers and heads together; what a layer and a head keeps is how many are theirs.

    Source: KVzip (arXiv 2505.23416, Sec. 3.4) and its non-uniform head budgets. The scores must be comparable between
    layers, as shares of attention are. Differs in: a layer's count is rounded to the same number for each of its
    heads on average, by its fraction, and then divided among them by the layer's own ranking.
    """

    waits: ClassVar[bool] = True
    ragged: ClassVar[bool] = True

    def tell(self, view: View, ranking: Tensor) -> Tensor:
        """Return (B, H T), the scores; -inf where there is no candidate."""
        candidate = view.valid & (ranking != torch.inf)
        finite = ranking.clamp(min=torch.finfo(ranking.dtype).min)
        return finite.masked_fill(~candidate, -torch.inf).flatten(1)

    def layers(self, room: Room, told: Sequence[Tensor]) -> Sequence[int]:
        """Count the best of the model in each layer."""
        free = room.num_layers * (room.budget - room.protected)
        layer = torch.repeat_interleave(torch.arange(len(told)), torch.tensor([len(one) for one in told]))
        scores = torch.cat(list(told))
        best = scores.argsort(descending=True, stable=True)[: room.num_heads * free]
        counts = torch.bincount(layer[best[scores[best].isfinite()]], minlength=room.num_layers)
        return split_layers(counts, room)

    def heads(self, view: View, candidates: Tensor, free: Tensor) -> Tensor:
        """Count the best of the layer in each head."""
        return best_of_layer(view, candidates, free)
