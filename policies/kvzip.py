"""KVzip: what the model needs to repeat its prompt stays, whatever is asked afterwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvbench.cache import Needs, ScorePolicy, View, When


@dataclass(frozen=True, kw_only=True)
class KVzip(ScorePolicy):
    """Keep the entries that are looked at most while the prompt is repeated over the whole cache.

    Source: KVzip (arXiv 2505.23416, Sec. 3; github.com/snu-mllab/KVzip, attention/score.py): after the prompt the model
    is told "Repeat the previous context exactly." and fed the prompt again, in chunks of 2,048 tokens with the 8 tokens
    before each; an entry's score is the largest attention that it receives from any of these queries and any query head
    of its group, among the sinks, its own chunk and the repeating tokens. One threshold holds for all heads of all
    layers: the allocation global_threshold, which the yaml names; without it every head keeps the same (the paper's
    uniform variant). Generated tokens are never dropped. Differs in: the end of the instruction is a line end, in a
    chat too; the chunk is shared with kvpress (the paper's is 2,000). A chunk that comes after the cut, such as a
    question, ranks first: scores are kept beside the slots, by position, for what was there.
    """

    needs: ClassVar[Needs] = Needs.REPEATED
    when: ClassVar[When] = When.PREFILL

    num_sinks: int = 4

    def remembered(self, view: View) -> Tensor:
        """Return (B, H, P) scores by position, infinite where nothing was repeated."""
        if view.repeated_or_none is None and view.memory_or_none is not None:
            return view.memory_or_none
        length = view.repeated.shape[-1]
        at = torch.where(view.valid, view.position, length)
        by_position = view.repeated.new_full((*at.shape[:2], length + 1), torch.inf)
        return by_position.scatter_(-1, at, view.repeated)[..., :-1].clone()

    def score(self, view: View) -> Tensor:
        """Return (B, H, T): the scores, infinite for what came after the prompt that was repeated."""
        known = self.remembered(view)
        found = known.gather(-1, view.position.clamp(min=0, max=known.shape[-1] - 1))
        return found.masked_fill(view.position >= known.shape[-1], torch.inf)
