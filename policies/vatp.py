"""VATP: attention received, weighted by how large a value it brings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvbench.cache import Needs, ScorePolicy, View


@dataclass(frozen=True, kw_only=True)
class VATP(ScorePolicy):
    """H2O's heavy hitters, each worth its attention times the L1 norm of its value; the sinks stay.

    Source: Attention Score is not All You Need for Token Importance Indicator in KV Cache Reduction (arXiv
    2406.12335), its "H2O w/ VATP" with 20 sinks: their values are tiny, so that the product would drop
    them. Differs in: the query heads of a KV head are averaged (the paper has no grouped queries).
    """

    needs: ClassVar[Needs] = Needs.MASS

    num_sinks: int = 20
    recent_fraction: float = 0.5

    def score(self, view: View) -> Tensor:
        """Return the attention mass times the L1 norm of the value."""
        return view.mass * view.values.float().abs().sum(dim=-1)
