"""TriAttention: keys that queries will look at, as the queries of a model usually are, stay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kvbench.cache import Calibrated, Layout, Sample, ScorePolicy, View

_OFFSETS = 2.0 ** torch.arange(17, dtype=torch.float64)  # 1, 2, 4 .. 65,536 tokens ahead


@dataclass(frozen=True, kw_only=True)
class TriAttention(Calibrated, ScorePolicy):
    """Keep the keys of largest expected product with queries to come, of each query head by its own statistics.

    Source: TriAttention (arXiv 2604.04921; WeianMao/triattention, pruning_utils.py): a query head's mean q_f and mean
    length E|q_f| of each rotary frequency f, before rotation, are learnt offline. A key at distance D from the newest
    token is worth the mean over offsets d = 1, 2, 4 .. 65,536 of sum_f |q_f| |k_f| cos(w_f (D + d) + phi_f), phi_f the
    angle between mean query and key, and sum_f (E|q_f| - |q_f|) |k_f|. Scores are standardised over the entries of a
    query head, and a KV head takes the largest of its group (mode per_layer_perhead). It plans again every 128
    generated tokens, which is the yaml's every_tokens. Differs in: the prompt is cut too, where the release keeps it,
    so that one budget holds for all; distances are those from the newest token, to which the release adds one (its
    first offset is two tokens ahead); scores are always standardised, which the release leaves to a switch; the mean
    over offsets is taken of the queries, turned to each, which is the same sum, and keys are read as they are stored.
    """

    def shapes(self, layout: Layout) -> Mapping[str, tuple[int, ...]]:
        """Name mean queries (H, G, D), mean lengths (H, G, F) and frequencies (F,), F = D / 2."""
        heads, half = (layout.num_heads, layout.group), layout.width // 2
        return {"mean": (*heads, layout.width), "length": (*heads, half), "frequencies": (half,)}

    def gather(self, sample: Sample) -> Mapping[str, Tensor]:
        """Sum queries and their lengths, and count both; the frequencies are counted with them."""
        query = sample.unrotated(sample.query).double() * sample.real[:, None, :, None]
        grouped = query.unflatten(1, (sample.keys.shape[1], -1))
        assert sample.rotation is not None
        count = sample.real.sum().double()
        return {
            "mean": grouped.sum(dim=(0, 3)),
            "length": _lengths(grouped).sum(dim=(0, 3)),
            "frequencies": sample.rotation.on(query.device).double() * count,
            "count": count,
        }

    def learn(self, sums: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the means."""
        return {name: (sums[name] / sums["count"]).float() for name in ("mean", "length", "frequencies")}

    def score(self, view: View) -> Tensor:
        """Return the largest standardised score (B, H, T) of each group."""
        learnt = view.artefact
        mean, frequencies = learnt["mean"].double(), learnt["frequencies"].double()
        first, second = mean.chunk(2, dim=-1)
        ahead = (view.seen - 1)[:, None].double() + _OFFSETS.to(mean.device)
        angles = ahead[..., None] * frequencies
        cos, sin = (turn.mean(dim=1)[:, None, None] for turn in (angles.cos(), angles.sin()))
        target = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).float()
        beyond = (learnt["length"] - _lengths(learnt["mean"])).float()
        keys = view.keys.float()
        expected = torch.einsum("bhgd,bhtd->bhgt", target, keys)
        expected = expected + torch.einsum("hgf,bhtf->bhgt", beyond, _lengths(keys))
        held = view.valid[:, :, None]
        count = held.sum(dim=-1, keepdim=True).clamp(min=1)
        centred = (expected - (expected * held).sum(dim=-1, keepdim=True) / count) * held
        deviation = (centred.square().sum(dim=-1, keepdim=True) / count).sqrt()
        return (centred / deviation.clamp(min=1e-12)).amax(dim=2)


def _lengths(states: Tensor) -> Tensor:
    """Return the length of each rotary pair, (..., D) to (..., D / 2)."""
    first, second = states.chunk(2, dim=-1)
    return torch.hypot(first, second)
