"""A uniformly random subset of the tokens seen: what a policy must beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvbench.cache import ScorePolicy, View

_MIX = (-7046029254386353131, -4658895280553007687, -7723592293110705685)


@dataclass(frozen=True, kw_only=True)
class Random(ScorePolicy):
    """Keep a random subset, drawn per layer and KV head; nothing is protected.

    Every token gets one fixed priority in [0, 1), a hash of (seed, sequence, layer, head, position), and
    the highest stay: at each step a uniform sample without memory. A sequence draws the same alone and
    in a batch; another one draws differently.
    """

    seed: int = 0

    def score(self, view: View) -> Tensor:
        """Return the priorities (B, H, T)."""
        heads = torch.arange(view.position.shape[1], device=view.position.device)[None, :, None]
        stream = (self.seed * view.num_layers + view.layer) * view.position.shape[1] + heads
        return _unit_hash(view.position + (stream + 1) * _MIX[0] + view.row_seed[:, None, None] * _MIX[1])


def _unit_hash(number: Tensor) -> Tensor:
    """SplitMix64's finalizer on int64 (wrapping), as float32 in [0, 1)."""
    mixed = (number ^ _shift(number, 30)) * _MIX[1]
    mixed = (mixed ^ _shift(mixed, 27)) * _MIX[2]
    return _shift(mixed ^ _shift(mixed, 31), 40).float() / 2.0**24


def _shift(number: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's is arithmetic."""
    return (number >> bits) & ((1 << (64 - bits)) - 1)
