"""How an answer is made: greedily or drawn, up to its end or to a fixed length.

A drawn token is the largest of logits / temperature + Gumbel noise, which is a draw from their softmax (Gumbel 1954;
Maddison et al. 2014, arXiv 1411.0030). The noise is made on the CPU, for each sequence from a generator of its own,
whose seed is the data set's item, the number of the draw and the task's seed: so it is the same alone and in a batch,
in both engines and on every device, and one draw has the same noise under every policy. Policy and full cache then
part only where their distributions do, as greedy answers do.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Answering:
    """One way to make an answer. temperature None: greedily. draw: which of several draws it is, from 0.

    natural_stop False: nothing ends an answer before `max_new_tokens`, and an end token is one like any other.
    """

    max_new_tokens: int
    natural_stop: bool = True
    temperature: float | None = None
    seed: int = 0
    draw: int = 0

    def numbered(self, draw: int) -> Answering:
        """Return the way of another draw."""
        return replace(self, draw=draw)

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the answers beside their length, as stored ones are called by; nothing for greedy ones."""
        stop = {} if self.natural_stop else {"natural_stop": False}
        drawn = {"temperature": self.temperature, "seed": self.seed, "draw": self.draw}
        return stop | ({} if self.temperature is None else drawn)

    def sampler(self, names: Sequence[str]) -> Sampler | None:
        """Return what chooses the tokens of the items called `names`, one a row; None where the likeliest is taken."""
        if self.temperature is None:
            return None
        seeds = [f"draw-v1/{self.seed}/{self.draw}/{name}" for name in names]
        return Sampler(temperature=self.temperature, seeds=seeds)


class Sampler:
    """Draws one token a row and call; what a row is given depends on its own seed and on how often it was asked."""

    def __init__(self, *, temperature: float, seeds: Sequence[str]) -> None:
        digests = [hashlib.sha256(seed.encode(errors="replace")).digest() for seed in seeds]
        self._generators = [torch.Generator().manual_seed(int.from_bytes(digest[:7], "big")) for digest in digests]
        self._temperature = temperature

    def __call__(self, logits: Tensor) -> Tensor:
        """Return the tokens (B,) int64 drawn from logits (B, V); a token of logit -inf never is."""
        size = logits.shape[-1]
        uniform = torch.stack([torch.rand(size, generator=one, dtype=torch.float64) for one in self._generators])
        noise = -(-uniform.to(logits.device).clamp_(min=_LEAST).log_()).log_()
        return (logits.double() / self._temperature + noise).argmax(dim=-1)


_LEAST = math.ulp(0.5)  # of the numbers that are drawn, 0 aside, which has no logarithm
