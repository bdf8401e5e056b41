"""Scissorhands: tokens that mattered of late will matter again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvbench.cache import Needs, ScorePolicy, View, When
from kvbench.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Scissorhands(ScorePolicy):
    """Keep the prompt's tokens that were pivotal for most of its last `history_tokens` queries, and the newest.

    Source: Scissorhands (arXiv 2305.17118, Alg. 2): a token is pivotal for a query that gives it at least
    the attention that it would get if all visible tokens got the same; history of 400 queries, 10 recent
    tokens. Differs in: generated tokens all stay (at decode the paper goes on counting over the last 400
    queries and drops half of the cache at once), and the query heads of a KV head are averaged. What counts is how
    often an entry was pivotal, so the newest of the history, which few queries saw, count for little; to count how
    often one was not would favour them. VATP's code (guozhiyu/vatp at 4894a7c) has the mean attention of those 400.
    """

    needs: ClassVar[Needs] = Needs.WINDOW
    when: ClassVar[When] = When.PREFILL
    window_tokens: ClassVar[int] = 400

    num_recent: int = 10
    history_tokens: int = 400

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.history_tokens <= self.window_tokens:
            raise ConfigError(
                f"policy.history_tokens is {self.history_tokens}; it must lie in 1 to {self.window_tokens} queries"
            )

    def score(self, view: View) -> Tensor:
        """Return for how many queries of the history the entry was pivotal."""
        rows = view.window[:, :, -self.history_tokens :]
        newer = torch.arange(rows.shape[2], device=rows.device).flip(0)[:, None]
        visible = (view.valid.sum(dim=-1)[:, :, None, None] - newer).clamp(min=1)
        return (rows * visible >= 1.0).sum(dim=2)
