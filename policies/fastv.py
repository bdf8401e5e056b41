"""FastV as eviction: picture tokens that an early layer's newest query passes over go from all later layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from kvbench.cache import Needs, ScorePolicy, View, When
from kvbench.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class FastV(ScorePolicy):
    """Rank the prompt by the newest query's attention in layer `first_layer` - 1, and cut alike from that layer on.

    Source: FastV (arXiv 2403.06764, Sec. 4.1), K = `first_layer`, layers from 0: attention of the last query in layer
    K - 1, averaged over the heads, ranks the picture tokens; the lowest go in all layers from K on, text stays whole
    (the yaml's `protect: text`). Differs in: entries leave the cache once the prompt is read, where FastV takes the
    tokens out of the model's own forward, so that later layers never see them; how many go is the harness's budget,
    which text counts in, instead of R = 50 % of the picture; layers below K are cut to the same budget by their own
    newest query, unless `skip_layers` lists them, as in the paper, where the budget can pay for that. A model of K
    layers or fewer has no layer that another one cuts. What is generated stays.
    """

    needs: ClassVar[Needs] = Needs.PROBS | Needs.PICTURE
    when: ClassVar[When] = When.PREFILL
    granularity: ClassVar[Literal["layer", "kv_head"]] = "layer"

    first_layer: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.first_layer < 1:
            raise ConfigError(f"policy.first_layer is {self.first_layer}; it must be at least 1, as 0 has none before")

    def score(self, view: View) -> Tensor:
        """Return (B, 1, T): attention in this layer, or in the one that ranks for it; 0 for what that one lost."""
        if view.handed is None:
            return view.probs.mean(dim=1, keepdim=True)
        return view.handed.gather(-1, view.position[:, 0].clamp(min=0))[:, None]

    def hand_over(self, view: View) -> Tensor | None:
        """Return (B, N), the attention of each position, in the layer that ranks for those after it."""
        if view.layer != self.first_layer - 1:
            return None
        position, attention = view.position[:, 0], view.probs.mean(dim=1).masked_fill(~view.valid[:, 0], 0.0)
        by_token = attention.new_zeros(len(position), int(view.seen.max()))
        return by_token.scatter_add_(-1, position.clamp(min=0), attention)
