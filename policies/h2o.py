"""H2O: heavy hitters and recent tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvbench.cache import Needs, ScorePolicy, View


@dataclass(frozen=True, kw_only=True)
class H2O(ScorePolicy):
    """Keep what has received most attention so far, half of the budget being the newest tokens.

    Source: H2O (arXiv 2306.14048, Alg. 1): accumulated attention per layer and head, updated at every
    decode step. Differs in: the query heads of a KV head are averaged (the paper has no grouped
    queries), and prompt scores are column sums over the whole prompt.
    """

    needs: ClassVar[Needs] = Needs.MASS

    recent_fraction: float = 0.5

    def score(self, view: View) -> Tensor:
        """Return the attention mass itself."""
        return view.mass
