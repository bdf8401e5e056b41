"""KVMerger's merge: runs of neighbours whose keys are alike become one, weighed by a Gaussian."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from kvbench.cache import Merge, Needs, Plan, View
from kvbench.cache.selection import oldest_first
from kvbench.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class KVMerger(Merge):
    """What goes joins the most attended survivor of its run, the neighbours whose keys are alike, pair by pair.

    Two neighbours by age belong to one run if the cosine of their keys is above `threshold`; sinks and recent tokens
    belong to none, and in a run without a survivor what goes is dropped. A member at distance d of the pivot's key
    weighs exp(-d^2 / (2 sigma^2)) and the pivot 1, over their sum, keys and values alike.

    Source: KVMerger (arXiv 2407.08454, Secs. 4.1 and 4.2), threshold 0.75. Differs in: the budget and the policy's
    score say who stays, so that a run may keep several, where in the paper each becomes one and the threshold decides
    how many there are; sigma is the mean distance of what joins a pivot over the root of 2, where the paper takes a
    mean of the kernel's own numbers. An entry that is freed at a decode step is dropped.
    """

    needs: ClassVar[Needs] = Needs.MASS

    threshold: float = 0.75

    def __post_init__(self) -> None:
        if not -1.0 <= self.threshold <= 1.0:
            raise ConfigError(f"policy.merge.threshold is {self.threshold:g}; it must lie in [-1, 1], as a cosine does")

    def into(self, view: View, keep: Tensor, protected: Tensor) -> Plan:
        """Name the pivot of each entry that goes, and what each brings."""
        order = oldest_first(view.position)
        run = self._runs(view, order, view.valid & ~protected)
        candidate = (keep & ~protected).gather(-1, order)
        mass = view.mass.gather(-1, order).masked_fill(~candidate, -torch.inf)
        most = torch.full_like(mass, -torch.inf).scatter_reduce_(-1, run, mass, "amax").gather(-1, run)
        place = torch.arange(order.shape[-1], device=order.device).expand(order.shape)
        best = torch.where(candidate & (mass == most), place, order.shape[-1])  # of equals the oldest
        pivot = torch.full_like(best, order.shape[-1]).scatter_reduce_(-1, run, best, "amin").gather(-1, run)
        has_pivot = pivot < order.shape[-1]
        target = order.gather(-1, torch.where(has_pivot, pivot, place))
        joins = torch.zeros_like(keep).scatter_(-1, order, has_pivot) & view.valid & ~keep
        own = torch.arange(keep.shape[-1], device=keep.device).expand(keep.shape)
        merge_into = torch.where(joins, torch.zeros_like(target).scatter_(-1, order, target), own)
        return Plan(keep=keep, merge_into=merge_into, merge_weight=_gaussian(view.keys, merge_into, joins))

    def _runs(self, view: View, order: Tensor, free: Tensor) -> Tensor:
        """(B, H, T) int64: the number of the run of each entry, by age; one that is not `free` is a run by itself."""
        directions = functional.normalize(view.keys.float(), dim=-1)
        directions = directions.gather(2, order[..., None].expand_as(directions))
        alike = (directions[:, :, 1:] * directions[:, :, :-1]).sum(dim=-1) > self.threshold
        free = free.gather(-1, order)
        linked = alike & free[..., 1:] & free[..., :-1]
        return functional.pad((~linked).long().cumsum(dim=-1), (1, 0))


def _gaussian(keys: Tensor, into: Tensor, joins: Tensor) -> Tensor:
    """(B, H, T) float32: the weight of each entry in the survivor `into` (B, H, T) that it joins."""
    far = (keys.double() - keys.double().gather(2, into[..., None].expand_as(keys))).norm(dim=-1)

    def over_run(numbers: Tensor) -> Tensor:
        return torch.zeros_like(far).scatter_add_(-1, into, numbers.masked_fill(~joins, 0.0))

    mean = over_run(far) / over_run(torch.ones_like(far))
    kernel = torch.exp(-((far / mean.gather(-1, into)) ** 2)).nan_to_num(nan=1.0)  # all as near as can be
    whole = 1.0 + over_run(kernel)
    return (torch.where(joins, kernel, 1.0) / whole.gather(-1, into)).float()
