"""Expected attention: what queries that are still to come will look at, as far as the prompt's tell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvbench.cache import Needs, ScorePolicy, View, When
from kvbench.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ExpectedAttention(ScorePolicy):
    """Keep what queries drawn like the prompt's would attend to at the next `future_tokens` places, by its value.

    Source: Expected Attention (arXiv 2510.00636, Sec. 3; ExpectedAttentionPress of kvpress, github.com/NVIDIA/kvpress
    at 8bb29b9). With m and S the mean and covariance of a head's queries before rotation, without the sinks', and R
    the mean rotation over the places from the prompt's end on: the softmax over keys k of m' k / sqrt(d) +
    k' S' k / 2d, m' = R m, S' = R S R', the mean over a group's query heads, plus `epsilon`, times the L2 norm of
    the value. The sinks stay. epsilon is 0 as in that press; its registry has 0.01, together with AdaKV.
    Kept entries and perplexity equal that press's on SmolLM2 (tests/parity). Differs in: products are scaled by
    1 / sqrt(d) whatever the model's own scaling is; moments are of the queries as the model made them, so that those
    which it normalises need no exception.
    """

    needs: ClassVar[Needs] = Needs.MOMENTS
    when: ClassVar[When] = When.PREFILL
    moments_from: ClassVar[int] = 4

    num_sinks: int = 4
    future_tokens: int = 512
    covariance: bool = True
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.future_tokens < 1:
            raise ConfigError(f"policy.future_tokens is {self.future_tokens}; it must be at least 1 token")
        if not self.epsilon >= 0.0:
            raise ConfigError(f"policy.epsilon is {self.epsilon:g}; it must be 0 or more")

    def score(self, view: View) -> Tensor:
        """Return the expected attention times the length of the value; infinite for the sinks."""
        keys, turn = view.keys.float(), self._mean_turn(view)[:, None]
        judged = view.valid & (view.position >= self.num_sinks)
        lowest, received = torch.finfo(torch.float32).min, torch.zeros(view.position.shape, device=keys.device)
        group, scale = view.query_mean.shape[2], keys.shape[-1] ** -0.5
        for head in range(group):
            logit = torch.matmul(keys, (view.query_mean[:, :, head, None] @ turn).transpose(-1, -2))[..., 0] * scale
            if self.covariance:
                spread = turn.transpose(-1, -2) @ view.query_covariance[:, :, head] @ turn
                logit = logit + (torch.matmul(keys, spread) * keys).sum(dim=-1) * (scale**2 / 2)
            received += logit.masked_fill(~judged, lowest).softmax(dim=-1) / group
        worth: Tensor = (received + self.epsilon) * torch.linalg.vector_norm(view.values.float(), dim=-1)
        return worth.masked_fill(view.valid & ~judged, torch.inf)

    def _mean_turn(self, view: View) -> Tensor:
        """Return (B, D, D): by what a row vector is multiplied to be turned to the next places, on average."""
        width, device = view.keys.shape[-1], view.keys.device
        ahead = torch.arange(self.future_tokens, device=device)[:, None].expand(-1, width)
        mean = view.rotation.turn(torch.eye(width, device=device).expand(len(ahead), -1, -1), ahead).mean(dim=0)
        start = view.seen[:, None].expand(-1, width)
        return view.rotation.turn(mean.expand(len(start), -1, -1), start)
