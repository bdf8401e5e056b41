"""What tokens that a task will score look at in the prompt, for a policy that is told before they come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from kvbench.cache import UNLIMITED, Needs, Policy
from kvbench.models.inputs import PromptBatch
from kvbench.models.loader import LoadedModel
from kvbench.tasks.decode import CacheSetting


@dataclass(frozen=True, kw_only=True)
class Watching(Policy):
    """The full cache, with the attention that each entry receives summed up."""

    needs: ClassVar[Needs] = Needs.MASS
    bounded: ClassVar[bool] = False


@torch.inference_mode()
def foreseen(loaded: LoadedModel, batch: PromptBatch, tokens: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    """Return of each layer (B, H, P) float32: what the full cache gives each position of the prompt of `batch`.

    It is the attention of the first lengths[row] of `tokens` (B, N), fed after the prompt, the mean over the query
    heads of a KV head; a question that follows the prompt is a part of it.
    """
    setting = CacheSetting(policy=Watching(), budget=UNLIMITED, positions="original")
    decoding = setting.decoding(loaded, batch, tokens.shape[1])
    layers = [layer.slots.entries for layer in decoding.cache.policy_layers if layer.slots is not None]
    places = [entries.position.clone() for entries in layers]
    for entries in layers:
        assert entries.mass is not None
        entries.mass.zero_()  # what the prompt itself gave is past
    found = [torch.zeros_like(place, dtype=torch.float32) for place in places]
    for start, end in pairwise(sorted({0, *lengths})):
        decoding.feed(tokens[:, start:end])
        rows = torch.tensor([length == end for length in lengths])
        for layer, place, told in zip(decoding.cache.policy_layers, places, found, strict=True):
            assert layer.slots is not None
            mass = layer.slots.entries.mass
            assert mass is not None
            ended, known = rows.to(mass.device), place >= 0
            received = mass[..., : place.shape[-1]].masked_fill(~known, 0.0)
            told[ended] = torch.zeros_like(told).scatter_add_(-1, place.clamp(min=0), received)[ended]
    return found
