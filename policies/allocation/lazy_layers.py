"""SimLayerKV's division: lazy layers, which look at what is protected only, keep only that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvbench.cache import Allocation, Needs, Room, View
from kvbench.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class LazyLayers(Allocation):
    """A layer whose newest query gives more than `threshold` of its attention to protected entries keeps those alone.

    Source: SimLayerKV (arXiv 2410.13846, Sec. 3): with 4 sinks and 1,024 recent tokens, at the end of the prompt;
    0.9 for Llama-3, 0.65 Llama-2, 0.8 Mistral, 0.85 Qwen. All other layers keep everything, so how much is held is
    an outcome: the budget only says from which length on a prompt is looked at. Differs in: attention is averaged
    over the KV heads.
    """

    total: ClassVar[Literal["exact", "bounded", "data_dependent"]] = "data_dependent"
    needs: ClassVar[Needs] = Needs.PROBS
    waits: ClassVar[bool] = True

    threshold: float = 0.9

    def __post_init__(self) -> None:
        if not 0.0 <= self.threshold <= 1.0:
            raise ConfigError(f"policy.allocation.threshold is {self.threshold:g}; it must lie in [0, 1]")

    def tell(self, view: View, ranking: Tensor) -> Tensor:
        """Return (B, 1): the attention on protected entries."""
        protected = view.valid & (ranking == torch.inf)
        return view.probs.masked_fill(~protected, 0.0).sum(dim=-1).mean(dim=1, keepdim=True)

    def layers(self, room: Room, told: Sequence[Tensor]) -> Sequence[int]:
        """Keep what is protected, or all."""
        return [room.protected if float(one) > self.threshold else room.tokens for one in told]
