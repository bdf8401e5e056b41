"""H2O's attention mass as a mean over the queries that saw an entry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvbench.cache import Needs, ScorePolicy, View, When


@dataclass(frozen=True, kw_only=True)
class H2OMean(ScorePolicy):
    """Keep the prompt's tokens that each query which could see them attended to most, by the mean.

    Source: ObservedAttentionPress of kvpress (github.com/NVIDIA/kvpress at 8bb29b9), which is often run as
    H2O. A sum favours the oldest tokens, which more queries saw; the mean favours the newest, which few did:
    the very last has its own attention to itself. As there, no window is protected and generated tokens all stay.
    """

    needs: ClassVar[Needs] = Needs.MASS
    when: ClassVar[When] = When.PREFILL

    def score(self, view: View) -> Tensor:
        """Return the attention mass by the number of tokens from the entry's own on."""
        return view.mass / (view.seen[:, None, None] - view.position).clamp(min=1)
