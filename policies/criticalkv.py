"""CriticalKV: half of the budget by attention, half by what an entry can do to the layer's output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvbench.cache import Needs, ScorePolicy, View, When
from kvbench.cache.selection import keep_top, pooled
from kvbench.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class CriticalKV(ScorePolicy):
    """SnapKV, but only `first_share` by its score; the rest by that score times the projected value's L1 norm.

    Source: Identify Critical KV Cache in LLM Inference from an Output Perturbation Perspective (arXiv 2502.03805,
    Alg. 1; CriticalKVPress of kvpress, github.com/NVIDIA/kvpress at 8bb29b9): of what the budget leaves beside the
    window, half goes to the entries of highest score s, and the rest by (s + 1e-4) |W_o v|_1, the norm a mean over
    the group's query heads. s is SnapKV's (arXiv 2404.14469), as a mean over the window's queries. Differs in: with
    heads of different lengths the first half is of what an even share would be. CriticalKVPress counts the window in
    the first half, so that fewer others are in it, and averages neighbours; with both taken over, kept entries and
    perplexity are equal on SmolLM2 (tests/parity).
    """

    needs: ClassVar[Needs] = Needs.WINDOW | Needs.OUTPUT
    when: ClassVar[When] = When.PREFILL
    window_tokens: ClassVar[int] = 32

    num_recent: int = 32
    kernel_tokens: int = 7
    pooling: Literal["max", "avg"] = "max"
    first_share: float = 0.5
    epsilon: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.num_recent <= self.window_tokens:
            raise ConfigError(f"policy.num_recent is {self.num_recent}; it must lie in 1 to {self.window_tokens}")
        if self.kernel_tokens < 1 or self.kernel_tokens % 2 == 0:
            raise ConfigError(f"policy.kernel_tokens is {self.kernel_tokens}; it must be odd and at least 1")
        if self.pooling not in ("max", "avg"):
            raise ConfigError(f"policy.pooling is {self.pooling!r}; it must be 'max' or 'avg'")
        if not 0.0 <= self.first_share <= 1.0:
            raise ConfigError(f"policy.first_share is {self.first_share:g}; it must lie in [0, 1]")
        if not self.epsilon >= 0.0:
            raise ConfigError(f"policy.epsilon is {self.epsilon:g}; it must be 0 or more")

    def score(self, view: View) -> Tensor:
        """Return infinity for the first half, and the weighted score for the others."""
        older = view.valid & (view.position < (view.seen - self.num_recent)[:, None, None])
        rows = view.window[:, :, -self.num_recent :]
        votes = (rows.sum(dim=2) / rows.shape[2]).masked_fill(~older, 0.0)
        score = pooled(votes, view.position, self.kernel_tokens, self.pooling)
        free = (view.budget - self.num_recent).clamp(min=0)
        first = (free.double() * self.first_share).round(decimals=9).floor().long()  # as in Budget
        chosen = keep_top(score, torch.where(older, view.position, -1), first)
        return ((score + self.epsilon) * self._projected(view)).masked_fill(chosen, torch.inf)

    def _projected(self, view: View) -> Tensor:
        """Return (B, H, T) float32: the L1 norm of what a value adds to the output, the mean over query heads."""
        found = [
            torch.stack([(values.float() @ one.float()).abs().sum(dim=-1) for one in weight]).mean(dim=0)
            for values, weight in zip(view.values.unbind(dim=1), view.output_weight, strict=True)
        ]
        return torch.stack(found, dim=1)
