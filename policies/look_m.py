"""LOOK-M: text stays before pictures, and what goes is merged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvbench.cache import Needs, ScorePolicy, View, When


@dataclass(frozen=True, kw_only=True)
class LookM(ScorePolicy):
    """Keep what the prompt attends to most, its text before its pictures, half of the budget being the newest tokens.

    Source: LOOK-M (arXiv 2406.18139, Sec. 3.2 and 3.3): column sums of the prompt's attention per head, of which
    picture tokens are put behind all text (its code takes 65,516 from them), recent and important tokens a half each
    (0.1 + 0.1 there), and every entry that goes is merged into the kept key of largest cosine: the yaml's
    `protect: text` and `merge: nearest_cosine`, the paper's pivot, average or weighted. The cache is looked at once,
    after the prompt. Differs in: the query heads of a KV head are averaged; where text alone exceeds the budget the
    best of it stays, as of equals; the code at ecf0f51 goes on cutting while it generates, with places of pictures that
    are no longer right, and knows pictures of 576 tokens only.
    """

    needs: ClassVar[Needs] = Needs.MASS
    when: ClassVar[When] = When.PREFILL

    recent_fraction: float = 0.5

    def score(self, view: View) -> Tensor:
        """Return the attention mass itself."""
        return view.mass
