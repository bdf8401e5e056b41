"""R-KV: what the last queries attend to, less what the cache holds already in other words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from kvbench.cache import Needs, ScorePolicy, View, When
from kvbench.cache.selection import pooled
from kvbench.errors import ConfigError

_BLOCK = 256  # keys that are compared with all others at once


@dataclass(frozen=True, kw_only=True)
class RKV(ScorePolicy):
    """Keep the newest tokens, and of the others those of highest `weight` importance - (1 - `weight`) redundancy.

    Source: R-KV (arXiv 2505.24133, Sec. 3; Zefan-Cai/R-KV, rkv/compression/r1_kv.py), each time that 128 more tokens
    are held. Importance: attention of the last `num_recent` queries on what is older than they are, by the largest of
    a group's query heads, a softmax over those entries, the mean over queries, and the largest of `kernel_tokens`
    neighbours. Redundancy: a softmax over the mean cosine of an entry's key to all others, where each of those leaves
    out the latest key that is nearer to it than `similar`, so that the newest of a kind stays. The weight is 0.1 in
    the paper, 0.07 in the code.

    Differs in: the largest of a group is taken of logits less the head's own log-sum-exp, which is all that rows of
    attention tell (the same without grouped queries); a key that has no near one leaves nothing out, where the code
    leaves out the first; the prompt is cut to the budget at once.
    """

    needs: ClassVar[Needs] = Needs.HEAD_ROWS
    window_tokens: ClassVar[int] = 8

    num_recent: int = 8
    every_tokens: int = 128
    weight: float = 0.1
    kernel_tokens: int = 7
    similar: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.num_recent <= self.window_tokens:
            raise ConfigError(f"policy.num_recent is {self.num_recent}; it must lie in 1 to {self.window_tokens}")
        if self.every_tokens < 2 and When.DECODE in self.when:
            raise ConfigError(
                f"policy.every_tokens is {self.every_tokens}; rows of the last queries are there where a block of 2 or "
                "more tokens is cut"
            )
        if not 0.0 <= self.weight <= 1.0:
            raise ConfigError(f"policy.weight is {self.weight:g}; it must lie in [0, 1]")
        if self.kernel_tokens < 1 or self.kernel_tokens % 2 == 0:
            raise ConfigError(f"policy.kernel_tokens is {self.kernel_tokens}; it must be odd and at least 1")
        if not 0.0 <= self.similar <= 1.0:
            raise ConfigError(f"policy.similar is {self.similar:g}; it must be a cosine, in [0, 1]")

    def score(self, view: View) -> Tensor:
        """Return the weighted difference of importance and redundancy."""
        older = view.valid & (view.position < (view.seen - self.num_recent)[:, None, None])
        rows = view.head_rows[:, :, :, -self.num_recent :].amax(dim=2).masked_fill(~older[:, :, None], 0.0)
        total = rows.sum(dim=-1, keepdim=True)
        mean = (rows / total.clamp(min=torch.finfo(rows.dtype).tiny)).sum(dim=2) / (total > 0).sum(dim=2).clamp(min=1)
        importance = pooled(mean, view.position, self.kernel_tokens, "max")
        return self.weight * importance - (1 - self.weight) * self._redundancy(view)

    def _redundancy(self, view: View) -> Tensor:
        """Return (B, H, T): the softmax over what is held of an entry's mean cosine to the others."""
        keys = functional.normalize(view.keys.float(), dim=-1).masked_fill(~view.valid[..., None], 0.0)
        places = torch.arange(keys.shape[2], device=keys.device)
        total = torch.zeros(view.position.shape, dtype=torch.float32, device=keys.device)
        for block in places.split(_BLOCK):
            cosine = torch.matmul(keys[:, :, block], keys.transpose(-1, -2))
            cosine = cosine.masked_fill(block[:, None] == places, 0.0)
            near = torch.where(cosine > self.similar, view.position[:, :, None], -1)
            latest = (near == near.amax(dim=-1, keepdim=True)) & (near >= 0)
            total += cosine.masked_fill(latest, 0.0).sum(dim=2)
        mean = total / view.valid.sum(dim=-1, keepdim=True).clamp(min=1)
        return mean.masked_fill(~view.valid, -torch.inf).softmax(dim=-1)
