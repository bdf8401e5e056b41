"""LagKV: a token is judged by how its key and value stand out from those that came after it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvbench.cache import ScorePolicy, View, When
from kvbench.cache.selection import age_rank, oldest_first
from kvbench.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class LagKV(ScorePolicy):
    """Cut the prompt in partitions of `lag_tokens` and keep of each what varies most against the next one.

    Source: LagKV (arXiv 2504.04704): keys and values are scaled, channel by channel, to the least and the
    largest of the next partition; a token's score is the softmax over its partition of the standard
    deviation over channels, keys plus values. Tokens compete by their place in their partition, so all give
    alike. Sinks (16), the last whole partition and what is left behind it have no later reference and stay;
    a budget too small for them keeps the newest. Differs in: generated tokens all stay (the paper goes on
    with each partition that fills up), and the share that partitions keep follows from the budget. LagKVPress
    of kvpress has 4 sinks and partitions of 128 too; the authors' code (lag_kv.py at 5b4f452) has 1,024 unless told.
    """

    when: ClassVar[When] = When.PREFILL

    num_sinks: int = 16
    lag_tokens: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lag_tokens < 2:
            raise ConfigError(f"policy.lag_tokens is {self.lag_tokens}; it must be at least 2 tokens")

    def score(self, view: View) -> Tensor:
        """Return the place in the partition as a share, 1 for what has no later reference."""
        oldest = oldest_first(view.position)
        length = oldest.shape[-1]
        judged = (view.valid.sum(dim=-1) - self.num_sinks) // self.lag_tokens - 1  # partitions of a row and head
        most = max(0, (length - self.num_sinks) // self.lag_tokens)
        by_age = torch.ones(oldest.shape, dtype=torch.float32, device=oldest.device)
        if most > 1:
            end = self.num_sinks + most * self.lag_tokens
            parts = oldest[:, :, self.num_sinks : end, None]
            score = self._lag_score(view.keys.float(), parts) + self._lag_score(view.values.float(), parts)
            place = score.argsort(dim=-1, stable=True).argsort(dim=-1) / self.lag_tokens
            number = torch.arange(most - 1, device=oldest.device)[:, None]
            place = torch.where(number < judged[:, :, None, None], place, 1.0)
            by_age[:, :, self.num_sinks : end - self.lag_tokens] = place.flatten(2)
        return by_age.gather(-1, age_rank(view.position))

    def _lag_score(self, states: Tensor, parts: Tensor) -> Tensor:
        """Return (B, H, P - 1, L): the softmax in each partition but the last of the deviation over channels."""
        states = states.gather(2, parts.expand(*parts.shape[:3], states.shape[-1]))
        states = states.unflatten(2, (-1, self.lag_tokens))
        least, most = states[:, :, 1:].amin(dim=3, keepdim=True), states[:, :, 1:].amax(dim=3, keepdim=True)
        scaled = (states[:, :, :-1] - least) / (most - least).clamp(min=torch.finfo(torch.float32).eps)
        return scaled.std(dim=-1).softmax(dim=-1)
