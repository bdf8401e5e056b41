"""Positions of Qwen-VL beyond its training length: dynamic NTK and log-n scaling.

Dynamic NTK: a prompt of n > L tokens (L the training length) is rotated with the base b x a^(D/(D-2)),
a = 2^(ceil(log2(n / L)) + 1) - 1. The prompt decides; its answer goes on with the same frequencies,
since keys that are cached already were rotated with them. Log-n: the query at position p is scaled by
log_L(p + 1) from p = L on. Both follow the tokens a row has seen and a token's true index in its row,
whatever a cache still holds and however far a batch was padded.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


class DynamicRotary(nn.Module):
    """Angles of the rotary embedding, one base per row."""

    rope_type = "dynamic NTK by prompt"

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.width = int(config.kv_channels)
        self.base = float(config.rotary_emb_base)
        self.trained_tokens = int(config.seq_length)
        self.dynamic = bool(config.use_dynamic_ntk)

    def stretch(self, prompt_tokens: Tensor) -> Tensor:
        """Return a (B,), float64, for prompts of `prompt_tokens` (B,) tokens; 1 up to the training length."""
        if not self.dynamic:
            return torch.ones_like(prompt_tokens, dtype=torch.float64)
        doublings = torch.log2(prompt_tokens.double() / self.trained_tokens).ceil()
        return (torch.exp2(doublings + 1) - 1).clamp(min=1)

    def fixed_rotation(self) -> tuple[Tensor, int]:
        """Return the frequencies (D / 2,) of rows within the training length, and that length in tokens."""
        powers = torch.arange(0, self.width, 2).float() / self.width
        return 1.0 / (self.base**powers), self.trained_tokens

    def forward(self, positions: Tensor, stretch: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines (B, 1, Q, D / 2), float32, of `positions` (B, Q)."""
        base = (self.base * stretch ** (self.width / (self.width - 2))).float()
        powers = torch.arange(0, self.width, 2, device=positions.device).float() / self.width
        frequencies = 1.0 / (base[:, None] ** powers)
        angles = positions[:, None, :, None].float() * frequencies[:, None, None]
        return angles.cos(), angles.sin()


def turned(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return `states` (B, H, Q, D) turned in half-split pairs, computed in float32."""
    first, second = states.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(states.dtype)


def query_scale(positions: Tensor, trained_tokens: int) -> Tensor:
    """Return the log-n factor (B, 1, Q, 1), float32, of queries at `positions` (B, Q)."""
    factor = (positions + 1).float().clamp(min=1).log() / math.log(trained_tokens)
    return torch.where(positions < trained_tokens, 1.0, factor)[:, None, :, None]
