"""ChunkKV: the prompt stays in whole chunks."""

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
class ChunkKV(ScorePolicy):
    """Keep the chunks of `chunk_tokens` that the prompt's last queries attend to most, and those tokens themselves.

    Source: ChunkKV (arXiv 2502.00299, Alg. 1): the attention of an observation window is summed over each
    chunk, the best chunks fill the budget beside the window, and all heads of a layer keep the same. Of the
    last chunk that fits in part only, the newest tokens stay. Differs in: every layer chooses for itself (the
    paper's re-use of one layer's choice in the next saves time). ChunkKVPress of kvpress has chunks of 20,
    pools its attention first, and leaves a part of the budget empty where whole chunks do not fill it.
    """

    needs: ClassVar[Needs] = Needs.WINDOW
    when: ClassVar[When] = When.PREFILL
    granularity: ClassVar[Literal["layer", "kv_head"]] = "layer"
    window_tokens: ClassVar[int] = 32

    num_recent: int = 32
    chunk_tokens: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.num_recent <= self.window_tokens:
            raise ConfigError(f"policy.num_recent is {self.num_recent}; it must lie in 1 to {self.window_tokens}")
        if self.chunk_tokens < 1:
            raise ConfigError(f"policy.chunk_tokens is {self.chunk_tokens}; it must be at least 1 token")

    def score(self, view: View) -> Tensor:
        """Return (B, 1, T): the attention that an entry's chunk received, chunks counted by age."""
        votes = view.window[:, :, -self.num_recent :].sum(dim=(1, 2)).masked_fill(~view.valid[:, 0], 0.0)
        rank = age_rank(view.position)[:, 0]
        by_age = torch.zeros_like(votes).scatter_(-1, rank, votes)
        whole = functional.pad(by_age, (0, -by_age.shape[-1] % self.chunk_tokens))
        chunks = whole.reshape(len(whole), -1, self.chunk_tokens).sum(dim=-1)
        return chunks.gather(-1, rank // self.chunk_tokens)[:, None]
