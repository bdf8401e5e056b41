"""CAKE's score: what the last queries attend to, and more where they do so by turns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvbench.cache import Needs, ScorePolicy, View, When
from kvbench.cache.selection import pooled
from kvbench.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Cake(ScorePolicy):
    """Keep the last `num_recent` tokens, and of the others those whose attention from them is large or varies.

    Source: CAKE (arXiv 2503.12491, Sec. 4.3): the mean plus `gamma` times the variance of an entry's column over the
    window's queries, of each query head, then the mean over `kernel_tokens` neighbours and over the group; gamma is
    200 in its code. Its division among layers is the allocation `cake`. Differs in: generated tokens all stay, where
    the code goes on dropping at each step by the newest row.
    """

    needs: ClassVar[Needs] = Needs.HEAD_ROWS
    when: ClassVar[When] = When.PREFILL
    window_tokens: ClassVar[int] = 32

    num_recent: int = 32
    gamma: float = 200.0
    kernel_tokens: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.num_recent <= self.window_tokens:
            raise ConfigError(f"policy.num_recent is {self.num_recent}; it must lie in 1 to {self.window_tokens}")
        if not self.gamma >= 0.0:
            raise ConfigError(f"policy.gamma is {self.gamma:g}; it must be 0 or more")
        if self.kernel_tokens < 1 or self.kernel_tokens % 2 == 0:
            raise ConfigError(f"policy.kernel_tokens is {self.kernel_tokens}; it must be odd and at least 1")

    def score(self, view: View) -> Tensor:
        """Return the pooled mean and variance of each column; rows of pads, which are zero, do not count."""
        rows = view.head_rows[:, :, :, -self.num_recent :]
        older = view.valid & (view.position < (view.seen - self.num_recent)[:, None, None])
        real = rows.masked_fill(~view.valid[:, :, None, None], 0.0).sum(dim=-1, keepdim=True) > 0
        count = real.sum(dim=3)
        mean = rows.sum(dim=3) / count.clamp(min=1)
        variance = (((rows - mean[:, :, :, None]) * real) ** 2).sum(dim=3) / (count - 1).clamp(min=1)
        votes = (mean + self.gamma * variance).mean(dim=2).masked_fill(~older, 0.0)
        return pooled(votes, view.position, self.kernel_tokens, "avg")
