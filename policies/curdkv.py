"""CurDKV: tokens whose key and value are long beside their neighbours' stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvbench.cache import Needs, ScorePolicy, View, When
from kvbench.cache.selection import age_rank
from kvbench.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class CurDKV(ScorePolicy):
    """Keep the entries of the largest product of two shares: of |k|^2 and of |v|^2, each within a run of tokens.

    Source: CURPress of kvpress (github.com/NVIDIA/kvpress at 8bb29b9) for CurDKV (arXiv 2509.15038), as that press is
    by default: squared lengths in place of leverage scores of a CUR decomposition, divided by their sum over the run
    of `run_tokens` tokens that a token is in, counted from the first; keys times values; sinks stay. The paper itself
    was not read. Differs in: tokens are counted by age among those held, so that it can be asked again later.
    """

    needs: ClassVar[Needs] = Needs.NOTHING
    when: ClassVar[When] = When.PREFILL

    num_sinks: int = 4
    run_tokens: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.run_tokens < 1:
            raise ConfigError(f"policy.run_tokens is {self.run_tokens}; it must be at least 1 token")

    def score(self, view: View) -> Tensor:
        """Return the products of shares."""
        rank = age_rank(view.position)
        return self._share(view.keys, view, rank) * self._share(view.values, view, rank)

    def _share(self, states: Tensor, view: View, rank: Tensor) -> Tensor:
        """Return (B, H, T): the squared length of each entry by the sum over its run."""
        squares = states.float().square().sum(dim=-1).masked_fill(~view.valid, 0.0)
        run = rank // self.run_tokens
        sums = torch.zeros_like(squares).scatter_add_(-1, run, squares)
        return squares / sums.gather(-1, run).clamp(min=torch.finfo(torch.float32).tiny)
