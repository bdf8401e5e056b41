"""AdaKV's division: heads of a layer hold as many entries as the best of the layer fall to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvbench.cache import Allocation, View
from kvbench.cache.parts import best_of_layer, split
from kvbench.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Ada(Allocation):
    """Give each head what it has among the best of all heads of its layer, mixed with an even share.

    Source: AdaKV (arXiv 2407.11550, Alg. 1): the top H C candidates of all H heads by score; a head with n of them
    gets (1 - alpha) n + alpha C. alpha is 0.2 in the paper and its release (FFY0/AdaKV). Differs in: rests are dealt
    out so that the total is exact; of equal scores the newer one counts first, then the earlier head. Protected
    entries are each head's own, as the window is there.
    """

    ragged: ClassVar[bool] = True

    alpha: float = 0.2

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= 1.0:
            raise ConfigError(f"policy.allocation.alpha is {self.alpha:g}; it must lie in [0, 1]")

    def heads(self, view: View, candidates: Tensor, free: Tensor) -> Tensor:
        """Count the best of the layer in each head."""
        counts = best_of_layer(view, candidates, free)
        even = (free.double() / counts.shape[1])[:, None]
        return split((1 - self.alpha) * counts + self.alpha * even, free, candidates.isfinite().sum(dim=-1))
