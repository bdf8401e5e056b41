"""SnapKV: what the end of the prompt looks at, with its neighbours, stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from kvbench.cache import Needs, ScorePolicy, View, When
from kvbench.cache.selection import age_rank
from kvbench.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SnapKV(ScorePolicy):
    """Keep the last `num_recent` tokens of the prompt, and of the others those that they attend to most.

    Source: SnapKV (arXiv 2404.14469, Sec. 4): the attention of the prompt's last queries, summed, then
    pooled over `kernel_tokens` neighbours so that runs of tokens stay together; the best per head stay
    and generated tokens are never dropped. The window counts in the budget and takes no part in the
    pooling, as in the paper. Differs in: the query heads of a KV head are averaged (the paper has no
    grouped queries), and the size is the harness's budget instead of a fixed number of entries.

    As released (github.com/FasterDecoding/SnapKV at 395b54d) it has pooling="avg" and kernel_tokens=5, which is
    the yaml `snapkv_released`. That code chooses per query head and then stores the keys of a KV head once
    per query head; here it equals the release on models without grouped queries, and has the group's mean,
    as in SnapKVPress of kvpress, on others.
    """

    needs: ClassVar[Needs] = Needs.WINDOW
    when: ClassVar[When] = When.PREFILL
    window_tokens: ClassVar[int] = 32

    num_recent: int = 32
    kernel_tokens: int = 7
    pooling: Literal["max", "avg"] = "max"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.num_recent <= self.window_tokens:
            raise ConfigError(f"policy.num_recent is {self.num_recent}; it must lie in 1 to {self.window_tokens}")
        if self.kernel_tokens < 1 or self.kernel_tokens % 2 == 0:
            raise ConfigError(f"policy.kernel_tokens is {self.kernel_tokens}; it must be odd and at least 1")
        if self.pooling not in ("max", "avg"):
            raise ConfigError(f"policy.pooling is {self.pooling!r}; it must be 'max' or 'avg'")

    def score(self, view: View) -> Tensor:
        """Return the pooled attention of the window's queries, neighbours counted by age."""
        votes = view.window[:, :, -self.num_recent :].sum(dim=2)
        in_window = view.position >= (view.seen - self.num_recent)[:, None, None]
        rank = age_rank(view.position)
        by_age = torch.zeros_like(votes).scatter_(-1, rank, votes.masked_fill(in_window | ~view.valid, 0.0))
        pool = functional.max_pool1d if self.pooling == "max" else functional.avg_pool1d
        pooled = pool(by_age, self.kernel_tokens, stride=1, padding=self.kernel_tokens // 2)
        return pooled.gather(-1, rank)
