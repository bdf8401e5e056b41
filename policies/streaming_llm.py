"""StreamingLLM: attention sinks and a sliding window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from kvbench.cache import ScorePolicy, View


@dataclass(frozen=True, kw_only=True)
class StreamingLLM(ScorePolicy):
    """Keep the first `num_sinks` tokens and the newest ones, as many as the budget allows.

    Source: StreamingLLM (arXiv 2309.17453, Sec. 3.2), 4 sinks, positions inside the cache. Differs
    in: the window is what the budget leaves, instead of a fixed size.
    """

    native_positions: ClassVar[Literal["original", "in_cache"]] = "in_cache"

    num_sinks: int = 4

    def score(self, view: View) -> Tensor:
        """Newer is better."""
        return view.position.float()
