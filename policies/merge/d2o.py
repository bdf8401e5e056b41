"""D2O's merge: what goes joins the most similar survivor, if it is more similar than what went before it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from kvbench.cache import Joining, Merge, Plan, View
from kvbench.errors import ConfigError

_BLOCK = 512  # entries whose likeness to all others lies in memory at once


@dataclass(frozen=True, kw_only=True)
class D2O(Merge):
    """An entry that goes joins the survivor of largest cosine between their keys, if that reaches a moving threshold.

    The threshold of a head is the mean over what its first cut lets go, then `momentum` of itself and the rest of that
    mean in each cut and step. A survivor c becomes, key and value, the mean of itself and what joins it, each weighed
    by exp of its cosine, c's own being 1 (`softmax`), or c and the others times their cosine, over their number.

    Source: D2O (arXiv 2406.13035, Sec. 3.3), momentum 0.5; `cosine` is what its release (AIoT-MLSys-Lab/D2O at 12c99d8)
    adds up. Sinks and recent tokens count as survivors, and the attention that a merged entry received is forgotten, as
    there. Differs in: the threshold is each head's and decides for each of its entries, where the release has one of a
    layer, and lets the n-th entries that go of all heads pass or not together, by their mean.
    """

    at_decode: ClassVar[bool] = True
    remembers: ClassVar[int] = 1

    momentum: float = 0.5
    weights: Literal["softmax", "cosine"] = "softmax"

    def __post_init__(self) -> None:
        if not 0.0 <= self.momentum <= 1.0:
            raise ConfigError(f"policy.merge.momentum is {self.momentum:g}; it must lie in [0, 1]")
        if self.weights not in ("softmax", "cosine"):
            raise ConfigError(f"policy.merge.weights is {self.weights!r}; it must be 'softmax' or 'cosine'")

    def into(self, view: View, keep: Tensor, protected: Tensor) -> Plan:
        """Name the most similar survivor of each entry that reaches the threshold, and what each brings."""
        cosine, nearest = _most_similar(functional.normalize(view.keys.float(), dim=-1), keep)
        goes = view.valid & ~keep & keep.any(dim=-1, keepdim=True)
        mean = cosine.double().masked_fill(~goes, 0.0).sum(dim=-1, keepdim=True) / goes.sum(dim=-1, keepdim=True)
        threshold = self._moved(view.memory_or_none, mean)
        joins = goes & (cosine >= threshold)
        own_place = torch.arange(keep.shape[-1], device=keep.device).expand(keep.shape)
        merge_into = torch.where(joins, nearest, own_place)
        brought, own = self._brought(cosine)
        joined = torch.zeros_like(brought).scatter_add_(-1, merge_into, torch.where(joins, self._counted(brought), 0.0))
        whole = own + joined
        weight = torch.where(joins, brought, own) / whole.gather(-1, merge_into)
        mass = None if view.mass_or_none is None else view.mass_or_none.masked_fill(~keep, 0.0)
        memory = threshold.float()
        return Plan(keep=keep, merge_into=merge_into, merge_weight=weight.float(), mass=mass, memory=memory)

    def joining(self, view: View, victim: Tensor) -> Joining:
        """Name the slot most similar to the victim."""
        gone = victim[..., None]
        directions = functional.normalize(view.keys.float(), dim=-1)
        one = directions.gather(2, gone[..., None].expand(*gone.shape, directions.shape[-1]))
        likeness = torch.matmul(directions, one.transpose(-1, -2))[..., 0]
        places = torch.arange(likeness.shape[-1], device=gone.device)
        others = view.valid & (places != gone)
        best = likeness.masked_fill(~others, -torch.inf).max(dim=-1, keepdim=True)
        cosine = best.values.double().masked_fill(~others.any(dim=-1, keepdim=True), torch.nan)
        threshold = self._moved(view.memory_or_none, cosine)
        joins = cosine >= threshold
        brought, own = self._brought(cosine)
        whole = own + self._counted(brought)
        weight, stays = torch.where(joins, brought / whole, 0.0), torch.where(joins, own / whole, 1.0)
        return Joining(into=best.indices, weight=weight, own=stays, memory=threshold.float())

    def _moved(self, before: Tensor | None, mean: Tensor) -> Tensor:
        """(B, H, 1): the threshold after a mean of NaN, which says that nothing went, or a number."""
        if before is None:
            return mean
        before = before.double()
        moved = torch.where(before.isnan(), mean, self.momentum * before + (1 - self.momentum) * mean)
        return torch.where(mean.isnan(), before, moved)

    def _brought(self, cosine: Tensor) -> tuple[Tensor, float]:
        """Return what an entry of `cosine` is weighed by, before all are divided, and the survivor's own weight."""
        return (cosine.double().exp(), math.e) if self.weights == "softmax" else (cosine.double(), 1.0)

    def _counted(self, brought: Tensor) -> Tensor:
        """Return what each adds to the number that all are divided by."""
        return brought if self.weights == "softmax" else torch.ones_like(brought)


def _most_similar(directions: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest cosine (B, H, T) and whose it is, among `target` (B, H, T); directions (B, H, T, D)."""
    cosines, places = [], []
    for block in directions.split(_BLOCK, dim=2):
        likeness = torch.matmul(block, directions.transpose(-1, -2)).masked_fill_(~target[:, :, None], -torch.inf)
        best = likeness.max(dim=-1)
        cosines.append(best.values)
        places.append(best.indices)
    return torch.cat(cosines, dim=2), torch.cat(places, dim=2)
