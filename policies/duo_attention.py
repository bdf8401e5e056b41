"""DuoAttention: heads that retrieve keep every token, the others sinks and the newest ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvbench.cache import Calibrated, Layout, Sample, ScorePolicy, View, When

_PLACES = 500  # at which the mean key stands before the mean query


@dataclass(frozen=True, kw_only=True)
class DuoAttention(Calibrated, ScorePolicy):
    """Score heads once for a model; the allocation retrieval_heads, which the yaml names, gives the best all tokens.

    Source: DuoAttention (arXiv 2410.10819) with 128 sinks and 256 recent tokens; which heads retrieve is trained there,
    on passkeys. Here it is the training-free score of kvpress (duo_attention_on_the_fly): of each text the mean query
    and the mean key before rotation, the key put at 500 places and the query at the last of them; a head's score is the
    area under its cumulated attention, which is small where attention stays with the newest places. Scores are averaged
    over texts and over the query heads of a KV head. Generated tokens are never dropped, as in kvpress. Differs in: the
    budget decides how many heads retrieve; prompts shorter than what is protected, at a budget below it, are cut to
    sinks and the newest tokens in all heads.
    """

    when: ClassVar[When] = When.PREFILL

    num_sinks: int = 128
    num_recent: int = 256

    def shapes(self, layout: Layout) -> Mapping[str, tuple[int, ...]]:
        """Name the score, (H,)."""
        return {"score": (layout.num_heads,)}

    def gather(self, sample: Sample) -> Mapping[str, Tensor]:
        """Sum the scores (H,) of the texts, and count these."""
        real = sample.real[:, None, :, None]
        count = real.sum(dim=2).clamp(min=1)
        query, key = ((sample.unrotated(s) * real).sum(dim=2) / count for s in (sample.query, sample.keys))
        assert sample.rotation is not None
        places = torch.arange(_PLACES, device=query.device)
        keys = sample.rotation.turn(key[:, :, None].expand(-1, -1, _PLACES, -1), places.expand(*key.shape[:2], _PLACES))
        last = sample.rotation.turn(query, places[-1].expand(query.shape[:2])).unflatten(1, (key.shape[1], -1))
        logits = torch.einsum("bhgd,bhtd->bhgt", last, keys) / query.shape[-1] ** 0.5
        area = logits.softmax(dim=-1).double().cumsum(dim=-1).mean(dim=-1).mean(dim=2)
        return {"area": area.sum(dim=0), "texts": torch.tensor(float(len(area)), dtype=torch.float64)}

    def learn(self, sums: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the mean score."""
        return {"score": (sums["area"] / sums["texts"]).float()}

    def score(self, view: View) -> Tensor:
        """Return the position: what is newer counts for more where a head cannot keep all."""
        return view.position.float()
