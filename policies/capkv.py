"""CapKV: values that add a direction of their own to what the expected query would read stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from kvbench.cache import Needs, ScorePolicy, View, When
from kvbench.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class CapKV(ScorePolicy):
    """Keep the entries of highest weighted leverage w_i v_i' A^-1 v_i, A = I + sum of w_i v_i v_i'.

    Source: CapPress of kvpress (github.com/NVIDIA/kvpress at 8bb29b9) for CapKV, Rethinking KV Cache Eviction via a
    Unified Information-Theoretic Objective (arXiv 2604.25975): the log-determinant of what is kept, by statistical
    leverage. w_i = exp(tau (cos(k_i, m) - the largest of them)), m the mean of a query head's queries before rotation,
    without the sinks', turned by the mean rotation over the next `future_tokens` places; the mean of w_i times the
    leverage over a group's query heads. The sinks stay. As that press, and not as the paper, keys and m are normalised
    and m is turned; the paper itself was not read beyond its abstract. Differs in: solved in float64 on a CPU and in
    float32 elsewhere.
    """

    needs: ClassVar[Needs] = Needs.MOMENTS
    when: ClassVar[When] = When.PREFILL
    moments_from: ClassVar[int] = 4

    num_sinks: int = 4
    tau: float = 5.0
    future_tokens: int = 512
    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tau >= 0.0:
            raise ConfigError(f"policy.tau is {self.tau:g}; it must be 0 or more")
        if self.future_tokens < 1:
            raise ConfigError(f"policy.future_tokens is {self.future_tokens}; it must be at least 1 token")
        if not self.epsilon >= 0.0:
            raise ConfigError(f"policy.epsilon is {self.epsilon:g}; it must be 0 or more")

    def score(self, view: View) -> Tensor:
        """Return the weighted leverage; infinite for the sinks."""
        number = torch.float64 if view.keys.device.type == "cpu" else torch.float32
        judged = view.valid & (view.position >= self.num_sinks)
        keys = functional.normalize(view.keys.to(number), dim=-1)
        values = view.values.to(number).masked_fill(~judged[..., None], 0.0)
        identity = torch.eye(values.shape[-1], dtype=number, device=values.device)
        anchor = functional.normalize(self._anchor(view).to(number), dim=-1)
        total = torch.zeros(view.position.shape, dtype=number, device=values.device)
        for head in range(anchor.shape[2]):
            cosine = torch.matmul(keys, anchor[:, :, head, :, None])[..., 0].clamp(-1.0, 1.0)
            logit = (self.tau * cosine).masked_fill(~judged, -torch.inf)
            most = logit.amax(dim=-1, keepdim=True)
            weight = (logit - torch.where(most.isfinite(), most, 0.0)).exp()
            held = values * (weight + self.epsilon).sqrt()[..., None]
            capacity = identity + torch.matmul(held.transpose(-1, -2), held)
            solved = torch.linalg.solve(capacity, values.transpose(-1, -2)).transpose(-1, -2)
            total += weight * (values * solved).sum(dim=-1)
        return (total / anchor.shape[2]).float().masked_fill(view.valid & ~judged, torch.inf)

    def _anchor(self, view: View) -> Tensor:
        """Return (B, H, G, D): the mean query, turned to the next places on average."""
        width, device = view.keys.shape[-1], view.keys.device
        ahead = torch.arange(self.future_tokens, device=device)[:, None].expand(-1, width)
        mean = view.rotation.turn(torch.eye(width, device=device).expand(len(ahead), -1, -1), ahead).mean(dim=0)
        start = view.seen[:, None].expand(-1, width)
        turn = view.rotation.turn(mean.expand(len(start), -1, -1), start)
        return torch.matmul(view.query_mean, turn[:, None])
