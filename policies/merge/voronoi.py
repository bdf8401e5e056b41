"""Elastic Cache's merge: what goes joins the nearest survivor on the line of tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvbench.cache import Merge, Plan, View
from kvbench.cache.selection import nearest_anchor


@dataclass(frozen=True, kw_only=True)
class Voronoi(Merge):
    """Each entry that goes joins the survivor nearest to it by age, which becomes the plain mean of its bucket.

    Source: Elastic Cache (arXiv 2407.18121, Eqs. 2 and 3). Half way the earlier survivor takes it. Protected entries
    take nothing in; where there are no others, what goes is dropped.
    """

    def into(self, view: View, keep: Tensor, protected: Tensor) -> Plan:
        """Name the nearest survivor of each entry."""
        merge_into = nearest_anchor(keep & ~protected, view.valid & ~protected, view.position)
        return Plan(keep=keep, merge_into=merge_into)
