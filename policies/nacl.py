"""NACL: some by what the prompt's end attends to, some by lot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvbench.cache import Needs, ScorePolicy, View, When
from kvbench.cache.selection import draws, gumbel, keep_top, outside
from kvbench.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class NACL(ScorePolicy):
    """Keep sinks and newest tokens, the best by the attention of proxy tokens, and a sample of the others.

    Source: NACL (arXiv 2408.03675, Sec. 3; PaddlePaddle/Research, NLP/ACL2024-NACL, src/llama_nacl_patch.py): proxies
    are the last `proxy_fraction` of the prompt; an entry's score is the sum of their attention. Of what is not
    protected `random_share` is drawn without replacement from those that are not among the best, by the softmax of
    their scores. Shares of what is kept are those of the code: of 20 % of a prompt 12 by score, 7 by lot, 1 protected.
    A sequence draws the same alone and in a batch. Differs in: 4 sinks, where the code has 256 for prompts of 128,000
    tokens, and counts them in the protected share, to which they are added here; at most 128 proxies; they do not see
    tokens after their own, which they do in the code.
    """

    needs: ClassVar[Needs] = Needs.WINDOW
    when: ClassVar[When] = When.PREFILL
    window_tokens: ClassVar[int] = 128

    num_sinks: int = 4
    recent_fraction: float = 0.05
    proxy_fraction: float = 0.01
    random_share: float = 0.37
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("proxy_fraction", "random_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"policy.{name} is {getattr(self, name):g}; it must lie in [0, 1]")

    def score(self, view: View) -> Tensor:
        """Return infinity for the best by score, and score plus Gumbel noise for the others, which is their draw."""
        count = view.window.shape[2]
        proxies = (view.seen.double() * self.proxy_fraction).round(decimals=9).floor().long().clamp(min=1, max=count)
        votes = torch.arange(count, 0, -1, device=proxies.device) <= proxies[:, None]
        score = (view.window * votes[:, None, :, None]).sum(dim=2)
        sinks, recent_from = self.protected_range(view.seen, view.budget)
        others = view.valid & ~outside(view.position, sinks, recent_from)
        free = (view.budget - sinks - (view.seen - recent_from)).clamp(min=0)
        best = free - (free.double() * self.random_share).round(decimals=9).floor().long()
        chosen = keep_top(score, torch.where(others, view.position, -1), best)
        noise = gumbel(draws(view.position, view.row_seed, self.seed * view.num_layers + view.layer))
        return (score + noise).masked_fill(chosen, torch.inf)
