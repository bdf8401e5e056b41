"""SimLayerKV: first and newest tokens, for layers that look at nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvbench.cache import ScorePolicy, View, When


@dataclass(frozen=True, kw_only=True)
class SimLayerKV(ScorePolicy):
    """Keep the prompt's first `num_sinks` tokens and its newest `num_recent`; which layers do so is an allocation.

    Source: SimLayerKV (arXiv 2410.13846, Sec. 3): 4 and 1,024 tokens stay in a lazy layer, everything in the others,
    which the yaml `simlayerkv` has by the allocation `lazy_layers`; tokens keep their positions. Differs in: generated
    tokens all stay, where the paper goes on with a lazy layer's window; a budget below sinks and window narrows it.
    SimLayerKVPress of kvpress keeps 1,023 recent tokens and is off unless a threshold is given.
    """

    when: ClassVar[When] = When.PREFILL

    num_sinks: int = 4
    num_recent: int = 1024

    def score(self, view: View) -> Tensor:
        """Newer is better."""
        return view.position.float()
