"""PrefixKV's division: every layer keeps the same share of its attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvbench.cache import Allocation, Needs, Room, View
from kvbench.cache.parts import split_layers


@dataclass(frozen=True, kw_only=True)
class Prefix(Allocation):
    """Each layer keeps its most attended entries until they hold a share p of its attention, one p for all layers.

    Source: PrefixKV (arXiv 2412.03409, Sec. 3.2) and its release (prefixkv.py at 39b7265): p is searched so that the
    entries are as many as the budget; here the entries of all layers are put in the order of the p at which they are
    reached, and the first ones taken. Attention is the column sum, averaged over the heads, of all entries: what is
    protected stays in any case, and what it holds counts. Differs in: found for the sequence itself, where the release
    averages ratios over other data beforehand.
    """

    needs: ClassVar[Needs] = Needs.MASS
    waits: ClassVar[bool] = True

    def tell(self, view: View, ranking: Tensor) -> Tensor:
        """Return (B, T): the share of attention that lies before each entry, the most attended first."""
        valid, candidate = view.valid.any(dim=1), (view.valid & (ranking != torch.inf)).any(dim=1)
        received = view.mass.mean(dim=1).masked_fill(~valid, 0.0).double()
        largest, order = received.sort(dim=-1, descending=True)
        before = (largest.cumsum(dim=-1) - largest) / largest.sum(dim=-1, keepdim=True).clamp(min=1e-30)
        return before.masked_fill(~candidate.gather(-1, order), torch.inf)

    def layers(self, room: Room, told: Sequence[Tensor]) -> Sequence[int]:
        """Take the entries that are reached first."""
        free = room.num_layers * (room.budget - room.protected)
        layer = torch.repeat_interleave(torch.arange(len(told)), torch.tensor([len(one) for one in told]))
        before = torch.cat(list(told))
        first = before.argsort(stable=True)[:free]
        counts = torch.bincount(layer[first[before[first].isfinite()]], minlength=room.num_layers)
        return split_layers(counts, room)
