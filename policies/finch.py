"""FINCH: what the question looks at stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvbench.cache import Needs, ScorePolicy, View, When


@dataclass(frozen=True, kw_only=True)
class Finch(ScorePolicy):
    """Keep the question, and of the rest of the prompt what the question's tokens attend to most.

    Source: FINCH (TACL 2024, tacl_a_00716, Sec. 3): the rows of the question's queries, each times the number of keys
    that it sees, so that a late row is not worth less, are averaged; the best per head stay beside the question
    (the yaml's `protect: question`), and keys are rotated to their places in the cache. As FinchPress of kvpress has
    it. Differs in: the prompt comes in one piece, where the paper reads it in chunks with the question after each; the
    query heads of a KV head are averaged; of a longer question the last `window_tokens` are read; what the chat
    template writes after the question counts as its end. In a later turn the question is that turn's. Where none is
    known, which kvbench refuses before a model is loaded, all queries of the window count, as in SnapKV.
    """

    needs: ClassVar[Needs] = Needs.WINDOW | Needs.QUESTION
    when: ClassVar[When] = When.PREFILL
    window_tokens: ClassVar[int] = 128
    native_positions: ClassVar[Literal["original", "in_cache"]] = "in_cache"

    def score(self, view: View) -> Tensor:
        """Return the mean of the question's rows, each times the number of entries that its query sees."""
        query = view.seen[:, None] - torch.arange(view.window.shape[2], 0, -1, device=view.seen.device)
        asked = torch.where(view.question, view.position, torch.iinfo(torch.int64).max).amin(dim=(1, 2))
        read = query >= asked[:, None]
        read |= ~read.any(dim=-1, keepdim=True)
        sees = view.valid[:, :, None] & (view.position[:, :, None] <= query[:, None, :, None])
        rows = view.window * sees.sum(dim=-1, keepdim=True) * read[:, None, :, None]
        return rows.sum(dim=2) / read.sum(dim=-1)[:, None, None]
