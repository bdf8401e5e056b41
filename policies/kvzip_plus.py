"""KVzip+: KVzip, by what a look at an entry does to the layer's output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvbench.cache import Needs, ScorePolicy, View, When


@dataclass(frozen=True, kw_only=True)
class KVzipPlus(ScorePolicy):
    """Keep the entries that move the output most, against what comes in, while the prompt is repeated.

    Source: KVzip+, the score that KVzap is trained on (arXiv 2601.07891; KVzipPress of kvpress with
    kvzip_plus_normalization, github.com/NVIDIA/kvpress at 8bb29b9): as KVzip (arXiv 2505.23416), but each share of
    attention a_ij of a repeating query i is multiplied by |W_o v_j|, through the query head's part of the output
    projection, and divided by |h_i|, the length of the hidden state that the layer's attention is given of i; then the
    largest over queries and the heads of a group. One threshold holds for all heads of all layers: the allocation
    global_threshold, which the yaml names. Generated tokens are never dropped. Differs in what KVzip does: the end of
    the instruction is a line end; a chunk that comes after the cut ranks first.
    """

    needs: ClassVar[Needs] = Needs.REPEATED | Needs.HIDDEN | Needs.OUTPUT
    when: ClassVar[When] = When.PREFILL
    repeated_as: ClassVar[Literal["attention", "output"]] = "output"

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
