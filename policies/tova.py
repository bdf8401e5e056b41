"""TOVA: what the newest token does not look at goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from kvbench.cache import Needs, ScorePolicy, View


@dataclass(frozen=True, kw_only=True)
class TOVA(ScorePolicy):
    """Keep what the newest query attends to most, by the mean over all heads: one set for the heads of a layer.

    Source: Transformers are Multi-State RNNs (arXiv 2401.06104), at every step as its TOVACache does (TOVA at
    275cf5f). Nothing is protected, not even the newest token. TOVAPress of kvpress protects that one and cuts
    the prompt alone.
    """

    needs: ClassVar[Needs] = Needs.PROBS
    granularity: ClassVar[Literal["layer", "kv_head"]] = "layer"

    def score(self, view: View) -> Tensor:
        """Return the newest row's mean over heads (B, 1, T)."""
        return view.probs.mean(dim=1, keepdim=True)
