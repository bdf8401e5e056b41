"""VaSE: the largest values stay, and a sample of what is attended to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvbench.cache import Needs, ScorePolicy, View, When
from kvbench.cache.selection import draws, gumbel, keep_top, pooled
from kvbench.errors import ConfigError

_LEAST = 1e-30  # of a share, whose logarithm is taken
_LATER = 1 << 24  # by which a token's number differs from one plan to the next


@dataclass(frozen=True, kw_only=True)
class VaSE(ScorePolicy):
    """Keep the newest tokens, `large_fraction` of the budget by the range of the value, and a draw of the others.

    Source: VaSE-AttnV of Value-Aware Stochastic KV Cache Eviction for Reasoning Models (arXiv 2606.03928;
    terarachang/VaSE at bfa2692, mode range_sink_sample_attn of EvictLayer, with its scripts' sizes for 4,096 entries),
    each time that 64 more tokens are held: of what is older than the last 64 tokens the entries of largest
    max(v) - min(v) stay, the 4 sinks among them, a quarter of the budget in all; the rest is drawn without replacement
    by the attention of the last 64 queries over those older entries, the mean over queries, the mean of 5 neighbours,
    the mean over a group's query heads. Each plan draws anew.

    Differs in: the draw is the largest of log share and Gumbel noise, which is one without replacement, from numbers of
    the sequence, so that a row draws the same alone and in a batch; the prompt is cut to the budget at once, where the
    code begins with the first block that is generated; blocks are counted from there.
    """

    needs: ClassVar[Needs] = Needs.HEAD_ROWS
    window_tokens: ClassVar[int] = 64

    num_sinks: int = 4
    num_recent: int = 64
    every_tokens: int = 64
    large_fraction: float = 0.25
    kernel_tokens: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.num_recent <= self.window_tokens:
            raise ConfigError(f"policy.num_recent is {self.num_recent}; it must lie in 1 to {self.window_tokens}")
        if self.every_tokens < 2 and When.DECODE in self.when:
            raise ConfigError(
                f"policy.every_tokens is {self.every_tokens}; rows of the last queries are there where a block of 2 or "
                "more tokens is cut"
            )
        if not 0.0 <= self.large_fraction <= 1.0:
            raise ConfigError(f"policy.large_fraction is {self.large_fraction:g}; it must lie in [0, 1]")
        if self.kernel_tokens < 1 or self.kernel_tokens % 2 == 0:
            raise ConfigError(f"policy.kernel_tokens is {self.kernel_tokens}; it must be odd and at least 1")

    def score(self, view: View) -> Tensor:
        """Return infinity for the largest values, and for the others the log of their share with noise."""
        older = view.valid & (view.position < (view.seen - self.num_recent)[:, None, None])
        large = self._large(view, older)
        rows = view.head_rows[:, :, :, -self.num_recent :].masked_fill(~older[:, :, None, None], 0.0)
        total = rows.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
        shares = pooled((rows / total).mean(dim=(2, 3)), view.position, self.kernel_tokens, "avg")
        token = view.position.clamp(min=0) + view.seen[:, None, None] * _LATER
        noise = gumbel(draws(token, view.row_seed, self.seed * view.num_layers + view.layer))
        return (shares.clamp(min=_LEAST).log() + noise).masked_fill(large, torch.inf)

    def _large(self, view: View, older: Tensor) -> Tensor:
        """Return (B, H, T) bool: the sinks and the widest values, as many as the budget has for them."""
        spread = (view.values.amax(dim=-1) - view.values.amin(dim=-1)).float()
        spread = spread.masked_fill(view.position < self.num_sinks, torch.inf)
        share = (view.budget.double() * self.large_fraction).round(decimals=9).floor().long()  # as in Budget
        number = torch.minimum(share, (view.budget - self.num_recent).clamp(min=0))
        return keep_top(spread, torch.where(older, view.position, -1), number)
