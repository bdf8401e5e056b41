"""KeyDiff: keys unlike all others stay."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from kvbench.cache import ScorePolicy, View


@dataclass(frozen=True, kw_only=True)
class KeyDiff(ScorePolicy):
    """Drop the entries whose keys point most along the mean direction of all keys of their head.

    Source: KeyDiff (arXiv 2504.15364): the score is minus the cosine to the anchor, the mean of the
    normalised keys that are held; nothing is protected. Differs in: the prompt is cut at once, where the
    paper takes it in blocks of 128 tokens and cuts after each. KeyDiffPress of kvpress is this score for
    the prompt alone.
    """

    def score(self, view: View) -> Tensor:
        """Return minus the cosine between each key and the anchor."""
        keys = functional.normalize(view.keys.float(), dim=-1).masked_fill(~view.valid[..., None], 0.0)
        anchor = keys.sum(dim=2, keepdim=True)  # its length does not change a cosine
        return -functional.cosine_similarity(keys, anchor, dim=-1)
