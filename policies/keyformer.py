"""Keyformer: attention received, with noise for what would have been attended to had others been kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvbench.cache import Needs, ScorePolicy, View, When
from kvbench.cache.selection import draws, gumbel
from kvbench.errors import ConfigError

_NUMBERS = 2**22  # drawn at once


@dataclass(frozen=True, kw_only=True)
class Keyformer(ScorePolicy):
    """Keep the newest tokens, and of the others those of highest Gumbel softmax, summed over the last queries.

    Source: Keyformer (arXiv 2403.09054, Sec. 3.3, Alg. 1; d-matrix-ai/keyformer-llm at f327831): a query gives each
    entry the softmax of (logit + Gumbel noise) / t, another noise for each query head, query and entry. t is 1 in the
    prompt and rises by 0.01 with each generated token; 30 % of what stays are the newest tokens. Draws hang on the
    seed and the sequence, the same alone and in a batch.

    Differs in: the sum is over the last `history_tokens` queries, kept in a ring while tokens are generated and set
    against what is held then, where the paper adds up all from the first on; and entries go in blocks of
    `every_tokens` instead of one a step.
    """

    needs: ClassVar[Needs] = Needs.HEAD_ROWS
    window_tokens: ClassVar[int] = 128

    recent_fraction: float = 0.3
    every_tokens: int = 16
    history_tokens: int = 128
    temperature: float = 1.0
    temperature_step: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.history_tokens <= self.window_tokens:
            raise ConfigError(
                f"policy.history_tokens is {self.history_tokens}; it must lie in 1 to {self.window_tokens} queries"
            )
        if not self.temperature > 0.0 or not self.temperature_step >= 0.0:
            raise ConfigError(
                f"policy.temperature is {self.temperature:g} and policy.temperature_step is {self.temperature_step:g}; "
                "the first must be above 0, the second 0 or more"
            )
        if self.every_tokens < 2 and When.DECODE in self.when:
            raise ConfigError(
                f"policy.every_tokens is {self.every_tokens}; rows of the last queries are there where a block of 2 or "
                "more tokens is cut"
            )

    def score(self, view: View) -> Tensor:
        """Return the sum over queries of the Gumbel softmax, the mean over a group's query heads."""
        rows = view.head_rows[:, :, :, -self.history_tokens :]
        _, _, group, count, _ = rows.shape
        back = torch.arange(count, 0, -1, device=rows.device)
        query = view.seen[:, None] - back  # positions (B, W), below 0 for a pad, whose row is zero
        warmth = self.temperature + self.temperature_step * (query - view.prompt[:, None] + 1).clamp(min=0)
        total = torch.zeros(view.position.shape, dtype=torch.float32, device=rows.device)
        for block in torch.arange(count, device=rows.device).split(max(1, _NUMBERS // view.position.numel())):
            token = view.position[:, :, None] + (query[:, None, block, None] << 32)
            for member in range(group):
                stream = (self.seed * view.num_layers + view.layer) * group + member
                row = rows[:, :, member, block].masked_fill(~view.valid[:, :, None], 0.0)
                warm = (row.log() + gumbel(draws(token, view.row_seed, stream))) / warmth[:, None, block, None]
                share = torch.where(row.sum(dim=-1, keepdim=True) > 0, warm.softmax(dim=-1), 0.0)
                total += share.sum(dim=2) / group
        return total
