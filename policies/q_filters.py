"""Q-Filters: keys that lie where a head's queries point stay, whatever is asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kvbench.cache import Calibrated, Layout, Sample, ScorePolicy, View


@dataclass(frozen=True, kw_only=True)
class QFilters(Calibrated, ScorePolicy):
    """Keep the keys of largest projection on the one direction that a head's queries share.

    Source: Q-Filters (arXiv 2503.02812, Sec. 3): of each query head's calibration queries, rotated as the model uses
    them, the top right singular vector v, with the sign by which they project positively on the whole; the KV head's
    filter is the mean over its query heads, and what stays is what has the largest <v, k>. No query of the sequence is
    looked at, so it cuts prompts and frees entries at decode alike. QFilterPress of kvpress scores -<f, k> with
    published filters f, which point the other way. Differs in: the vector is found from the sum of q q^T, which is the
    same one, so that calibration data of any length fits; the paper's 20 documents are the data set's examples; the
    sign is that of the queries' sum, in the authors' code (NathanGodey/qfilters at cda5c38) that of most of them; and
    no newest tokens are protected, as in that press, where the authors' cache always has a window, in its example 64
    of 128 entries, which is recent_fraction=0.5.
    """

    def shapes(self, layout: Layout) -> Mapping[str, tuple[int, ...]]:
        """Name the filter, (H, D)."""
        return {"filter": (layout.num_heads, layout.width)}

    def gather(self, sample: Sample) -> Mapping[str, Tensor]:
        """Sum q q^T (H, G, D, D) and q (H, G, D) of the rotated queries; without pads."""
        grouped = (sample.query.double() * sample.real[:, None, :, None]).unflatten(1, (sample.keys.shape[1], -1))
        return {"outer": torch.einsum("bhgtd,bhgte->hgde", grouped, grouped), "total": grouped.sum(dim=(0, 3))}

    def learn(self, sums: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the mean over query heads of the leading eigenvectors, each on the side of its queries."""
        leading = torch.linalg.eigh(sums["outer"]).eigenvectors[..., -1]
        side = (leading * sums["total"]).sum(dim=-1, keepdim=True)
        return {"filter": torch.where(side < 0, -leading, leading).mean(dim=1).float()}

    def score(self, view: View) -> Tensor:
        """Return the projections (B, H, T)."""
        return (view.keys.float() * view.artefact["filter"][None, :, None]).sum(dim=-1)
