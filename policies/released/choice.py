"""How the code of Elastic Cache chooses entries: index arithmetic that its policies share.

All of it counts entries by age, oldest first, which is the order of the tensors in that code; slots
are not kept in that order here, so indices are translated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvbench.cache.selection import age_rank


def slots_by_age(position: Tensor) -> Tensor:
    """Return (B, H, T) int64: the slot of the oldest entry, of the next one, .. and the empty slots."""
    return age_rank(position).argsort(dim=-1)


def sorted_order_as_rank(score: Tensor, position: Tensor, *, first: int, count: Tensor) -> Tensor:
    """Return (B, H, T) bool: `count` entries chosen by an argsort that is taken for ranks.

    score (B, H, T), -inf or finite; count (B, H). The candidates are all entries but the `first` oldest
    and the newest. Candidate j is taken if the j-th smallest score belongs to one of the `count` last
    candidates. That is the inverse of the permutation which would give the `count` best, and equals it
    only where scores grow with position.
    """
    slot = slots_by_age(position)
    held = (position >= 0).sum(dim=-1, keepdim=True)
    by_age = score.gather(-1, slot)
    index = torch.arange(score.shape[-1], device=score.device).expand_as(slot)
    is_candidate = (index >= first) & (index < held - 1)
    order = by_age.masked_fill(~is_candidate, torch.inf).argsort(dim=-1, stable=True) - first
    num_candidates = (held - 1 - first).clamp(min=0)
    taken = (index < num_candidates) & (order >= num_candidates - count[..., None])
    return taken.roll(first, dims=-1).gather(-1, age_rank(position))


def merge_with_lost_offset(dropped: Tensor, nearest: Tensor, position: Tensor, *, offset: int) -> tuple[Tensor, Tensor]:
    """Return (into, source), each (B, H, T) int64, for indices that lack the `offset` they are counted from.

    A dropped entry brings not its own key and value but those of the entry `offset` places older, into
    the anchor nearest to that one. dropped (B, H, T) bool; nearest (B, H, T) int64, each entry's nearest
    anchor, an anchor's being itself. Others bring themselves to themselves.
    """
    slot, rank = slots_by_age(position), age_rank(position)
    own = torch.arange(position.shape[-1], device=position.device).expand_as(position)
    older = slot.gather(-1, (rank - offset).clamp(min=0))
    return torch.where(dropped, nearest.gather(-1, older), own), torch.where(dropped, older, own)
