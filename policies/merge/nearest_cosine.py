"""Merge by likeness: what goes joins the survivor whose key points in the most similar direction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from kvbench.cache import Merge, Plan, View
from kvbench.errors import ConfigError

_BLOCK = 512  # entries whose likeness to all others lies in memory at once


@dataclass(frozen=True, kw_only=True)
class NearestCosine(Merge):
    """Each entry that goes joins the survivor of largest cosine between their keys.

    Source: LOOK-M (arXiv 2406.18139, Sec. 3.3), which names three ways for a survivor c and the entries e of its
    bucket. `average`: the mean of all. `pivot`: the mean of c and of every (c + e) / 2. `weighted`: the mean of c and
    of every e times its cosine, over their number. Keys as they are stored, rotated. Differs in: sinks and recent
    tokens, which count as survivors there, take part only with `protected_too`; entries of a cosine below `threshold`
    are dropped, as in D2O (arXiv 2406.13035), none of them at -1; `values_only` leaves keys as they are.
    """

    how: Literal["average", "pivot", "weighted"] = "pivot"
    threshold: float = -1.0
    values_only: bool = False
    protected_too: bool = True

    def __post_init__(self) -> None:
        if self.how not in ("average", "pivot", "weighted"):
            raise ConfigError(f"policy.merge.how is {self.how!r}; it must be 'average', 'pivot' or 'weighted'")
        if not -1.0 <= self.threshold <= 1.0:
            raise ConfigError(f"policy.merge.threshold is {self.threshold:g}; it must lie in [-1, 1], as a cosine does")

    def into(self, view: View, keep: Tensor, protected: Tensor) -> Plan:
        """Name the most similar survivor of each entry, and what each brings."""
        target = keep if self.protected_too else keep & ~protected
        cosine, nearest = _most_similar(functional.normalize(view.keys.float(), dim=-1), target)
        joins = view.valid & ~keep & target.any(dim=-1, keepdim=True) & (cosine >= self.threshold)
        own = torch.arange(keep.shape[-1], device=keep.device).expand(keep.shape)
        merge_into = torch.where(joins, nearest, own)
        joined = torch.zeros_like(cosine).scatter_add_(-1, merge_into, joins.float())
        share = 1 / (1 + joined)  # of each of the numbers that a survivor is the mean of
        brought = {"average": torch.ones_like(cosine), "pivot": torch.full_like(cosine, 0.5), "weighted": cosine}
        itself = 1 + joined / 2 if self.how == "pivot" else torch.ones_like(joined)
        weight = torch.where(joins, brought[self.how] * share.gather(-1, merge_into), itself * share)
        return Plan(keep=keep, merge_into=merge_into, merge_weight=weight, merge_keys=not self.values_only)


def _most_similar(directions: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest cosine (B, H, T) and whose it is, among `target` (B, H, T); directions (B, H, T, D)."""
    cosines, places = [], []
    for block in directions.split(_BLOCK, dim=2):
        likeness = torch.matmul(block, directions.transpose(-1, -2)).masked_fill_(~target[:, :, None], -torch.inf)
        best = likeness.max(dim=-1)
        cosines.append(best.values)
        places.append(best.indices)
    return torch.cat(cosines, dim=2), torch.cat(places, dim=2)
