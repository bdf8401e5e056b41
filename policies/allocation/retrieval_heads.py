"""DuoAttention's division: retrieval heads keep every token, the others what is protected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvbench.cache import Allocation, Needs, Room, View
from kvbench.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RetrievalHeads(Allocation):
    """Heads of the largest score keep all tokens, as many as the budget pays for; the others what is protected.

    Source: DuoAttention (arXiv 2410.10819, Sec. 2), whose heads are chosen once for a model: the policy's artefact
    holds a `score` (H,) of each layer. Differs in: the share of retrieval heads follows from the budget, where the
    paper chooses it; a head is all or nothing, so that up to one head's tokens of the total stay unused.
    """

    total: ClassVar[Literal["exact", "bounded", "data_dependent"]] = "bounded"
    needs: ClassVar[Needs] = Needs.ARTEFACT
    ragged: ClassVar[bool] = True

    def layers(self, room: Room, told: Sequence[Tensor]) -> Sequence[int]:
        """Give heads all tokens, the best of the model first, while all layers together stay within the total."""
        if room.artefact is None:
            raise ConfigError("the allocation retrieval_heads reads a policy's artefact; it needs policy=duo_attention")
        score = torch.stack([one["score"] for one in room.artefact])
        counts, found = [0] * room.num_layers, [room.protected] * room.num_layers
        for head in score.flatten().argsort(descending=True, stable=True).tolist():
            layer = head // room.num_heads
            counts[layer] += 1
            whole = counts[layer] * room.tokens + (room.num_heads - counts[layer]) * room.protected
            given = -(-whole // room.num_heads)
            if sum(found) - found[layer] + given > room.num_layers * room.budget:
                break
            found[layer] = given
        return found

    def heads(self, view: View, candidates: Tensor, free: Tensor) -> Tensor:
        """Give the layer's best heads all their candidates, while they fit."""
        most = candidates.isfinite().sum(dim=-1)
        order = view.artefact["score"].argsort(descending=True, stable=True)
        fits = most[:, order].cumsum(dim=-1) <= free[:, None]
        return torch.zeros_like(most).scatter_(1, order.expand_as(most), most[:, order] * fits)
