"""Choose entries: top-k that stays, the victim of a step, the nearest survivor.

Ties are decided once, here: of two entries with equal scores the older one goes first.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from kvbench.kernels.dispatch import use_triton

_MIX = (-7046029254386353131, -4658895280553007687, -7723592293110705685)  # of SplitMix64
_NO_POSITION = torch.iinfo(torch.int64).max


def keep_top(score: Tensor, position: Tensor, budget: Tensor) -> Tensor:
    """Return (B, H, T) bool, True for the entries of highest score in each (b, h), `budget[b]` or `budget[b, h]`.

    score (B, H, T); position (B, H, T), -1 = empty slot, never kept; budget (B,) or (B, H). Of a (b, h) where the
    score of a held entry is NaN nothing is kept, which no plan may do.
    """
    budget = budget[:, None] if budget.ndim == 1 else budget
    if use_triton(score):
        from kvbench.kernels import ordering

        return ordering.keep_top(score, position, budget)
    unknown = (score.isnan() & (position >= 0)).any(dim=-1, keepdim=True)
    score = score.masked_fill(position < 0, -torch.inf)
    newest_first = position.argsort(dim=-1, descending=True)
    best_first = score.gather(-1, newest_first).argsort(dim=-1, descending=True, stable=True)
    order = newest_first.gather(-1, best_first)
    return (_inverse(order) < budget[..., None]) & (position >= 0) & ~unknown


def lowest(score: Tensor, position: Tensor) -> Tensor:
    """Return (B, H) int64, the slot of lowest score among held entries, the oldest of equals.

    -1, which is no slot, where the score of a held entry is NaN: then none is the lowest.
    """
    score = score.masked_fill(position < 0, torch.inf)
    least = score.amin(dim=-1, keepdim=True)  # NaN if any is
    tied = (score == least) & (position >= 0)
    oldest = torch.where(tied, position, _NO_POSITION).argmin(dim=-1)
    return oldest.masked_fill(least[..., 0].isnan(), -1)


_HALF = 0x3FC00000  # half of the bits of infinity


def ranked_above(score: Tensor, first: Tensor) -> Tensor:
    """Return finite float32 scores in which all of `first` is above all else, and each of both in its own order.

    score (B, H, T) or (B, 1, T); first (B, H, T) bool. Floats are in the order of their bits, and each part gets one
    half of these, so that scores which differ in the last bit alone count as equal. NaN stays NaN.
    """
    most = torch.finfo(torch.float32).max / 2
    bits = (score.float().clamp(-most, most) + 0.0).view(torch.int32)  # minus zero is zero
    order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits) >> 1
    order = torch.where(first, order + _HALF, order - _HALF)
    ranked = torch.where(order < 0, order ^ 0x7FFFFFFF, order).view(torch.float32)
    return torch.where(score.isnan(), torch.nan, ranked)


def protected_entries(
    position: Tensor, seen: Tensor, budget: Tensor, *, num_sinks: int, num_recent: int, recent_fraction: float
) -> Tensor:
    """Return (B, H, T) bool: the sinks and the recent window, never more of them than the budget.

    The window is the larger of `num_recent` tokens and `recent_fraction` of the budget. Where the
    budget is too small for both, one entry is left to the window and the rest to the sinks.
    """
    sinks, recent_from = protected_range(
        seen, budget, num_sinks=num_sinks, num_recent=num_recent, recent_fraction=recent_fraction
    )
    return outside(position, sinks, recent_from)


def outside(position: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """Return (B, H, T) bool: entries held at positions below `first` (B,) or from `last` (B,) on."""
    if use_triton(position, any_dtype=True):
        from kvbench.kernels import ordering

        return ordering.outside(position, first, last)
    below, above = position < first[:, None, None], position >= last[:, None, None]
    return (below | above) & (position >= 0)


def shielded(score: Tensor, position: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """Return (B, H, T) float32: `score` (B, H or 1, T), infinite where `outside`, and at most finite elsewhere."""
    if use_triton(score):
        from kvbench.kernels import ordering

        return ordering.shielded(score, position, first, last)
    finite = score.float().clamp(max=torch.finfo(torch.float32).max)
    return finite.expand(position.shape).masked_fill(outside(position, first, last), torch.inf)


def protected_range(
    seen: Tensor, budget: Tensor, *, num_sinks: int, num_recent: int, recent_fraction: float
) -> tuple[Tensor, Tensor]:
    """Return (B,) each: positions below the first and from the second on are protected, as above."""
    if use_triton(budget, any_dtype=True):
        from kvbench.kernels import ordering

        window = {"num_sinks": num_sinks, "num_recent": num_recent}
        return ordering.protected_range(seen, budget, **window, recent_fraction=recent_fraction)
    sinks = (budget - 1).clamp(max=num_sinks)
    share = (budget.double() * recent_fraction).round(decimals=9).floor().long()  # as in Budget: 0.29 of 100 is 29
    recent = torch.minimum(share.clamp(min=num_recent), budget - sinks)
    return sinks, seen - recent


def has_nan(numbers: Tensor, position: Tensor) -> Tensor:
    """Return a bool of no dimensions: whether one of the numbers (B, H, ..., T) of an entry that is held is NaN."""
    if use_triton(numbers):
        from kvbench.kernels import ordering

        return ordering.has_nan(numbers, position)
    held = (position >= 0)[(slice(None), slice(None), *[None] * (numbers.ndim - 3))]
    return (numbers.isnan() & held).any()


def looked_at(
    keep: Tensor, into: Tensor | None, position: Tensor, budget: Tensor, *, exact: bool
) -> tuple[Tensor, Tensor]:
    """Return what a plan does and what is wrong with it: counts (B, H, 4) int64 and (4,) bool, which waits for nothing.

    keep (B, H, T) bool; into (B, H, T) int64, whom each entry joins, or None; position (B, H, T); budget (B,). The
    first: how many entries a head keeps, how many it holds, the least and the largest of `into`, 0 without one. The
    second, of all heads: an empty slot is kept; more are kept than the budget, or none of those that are held, or,
    `exact`, not as many as may be; `into` names entries that do not exist; or one, not itself, that is not kept.
    """
    if use_triton(position, any_dtype=True):
        from kvbench.kernels import ordering

        return ordering.looked_at(keep, into, position, budget, exact=exact)
    kept, held, most = keep.sum(dim=-1), (position >= 0).sum(dim=-1), budget[:, None]
    miscounted = (kept > most) | ((held > 0) & (kept < 1))  # a row may have had pads only
    if exact:
        miscounted = miscounted | (kept != torch.minimum(held, most))
    least, largest, nowhere, lost = torch.zeros_like(kept), torch.zeros_like(kept), miscounted[:0], miscounted[:0]
    if into is not None:
        last, itself = into.shape[-1] - 1, into == torch.arange(into.shape[-1], device=into.device)
        least, largest = into.aminmax(dim=-1)
        nowhere, lost = (least < 0) | (largest > last), ~(keep.gather(-1, into.clamp(0, last)) | itself)
    amiss = [(keep & (position < 0)).any(), miscounted.any(), nowhere.any(), lost.any()]
    return torch.stack((kept, held, least, largest), dim=-1), torch.stack(amiss)


def age_rank(position: Tensor) -> Tensor:
    """Return (B, H, T) int64: how many held entries are older; empty slots come last."""
    if use_triton(position, any_dtype=True):
        from kvbench.kernels import ordering

        return ordering.age_rank(position)
    return _inverse(oldest_first(position))


def _inverse(order: Tensor) -> Tensor:
    """Return the place of each entry in `order`, a permutation along the last dimension."""
    places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def pooled(votes: Tensor, position: Tensor, kernel_tokens: int, pooling: Literal["max", "avg"]) -> Tensor:
    """Return (B, H, T): each entry's largest or mean vote of `kernel_tokens`, odd, neighbours by age; none counts as 0.

    votes (B, H, T) of 0 or more; empty slots have none.
    """
    rank = age_rank(position)
    by_age = torch.zeros_like(votes).scatter_(-1, rank, votes.masked_fill(position < 0, 0.0))
    pool = functional.max_pool1d if pooling == "max" else functional.avg_pool1d
    found: Tensor = pool(by_age, kernel_tokens, stride=1, padding=kernel_tokens // 2)
    return found.gather(-1, rank)


def oldest_first(position: Tensor) -> Tensor:
    """Return (B, H, T) int64: the entries from the oldest to the newest; empty slots come last."""
    if use_triton(position, any_dtype=True):
        from kvbench.kernels import ordering

        return ordering.oldest_first(position)
    return torch.where(position >= 0, position, _NO_POSITION).argsort(dim=-1, stable=True)


def entry_of_rank(position: Tensor, rank: Tensor) -> Tensor:
    """Return (B, H) int64, the slot of the held entry that has `rank` (B, H) older ones; position (B, H, T)."""
    if use_triton(position, any_dtype=True):
        from kvbench.kernels.slot_writes import find_slot

        return find_slot(position, rank)
    return (age_rank(position) == rank[..., None]).long().argmax(dim=-1)


def entry_before_newest(position: Tensor, newer: int, *, sinks: int) -> Tensor:
    """Return (B, H) int64, the slot of the held entry that has `newer` newer ones; position (B, H, T).

    In a cache too small for that it is the entry after the first `sinks`, and never the newest where there
    is another.
    """
    if use_triton(position, any_dtype=True):
        from kvbench.kernels.slot_writes import find_slot

        return find_slot(position, newer=newer, sinks=sinks)
    newest = (position >= 0).sum(dim=-1) - 1
    return entry_of_rank(position, (newest - newer).clamp(min=sinks).minimum((newest - 1).clamp(min=0)))


def nearest_anchor(anchor: Tensor, member: Tensor, position: Tensor) -> Tensor:
    """Return (B, H, T) int64: for each member the index of the nearest anchor, else its own index.

    Nearest on the line of held entries by age, which is not the order of storage once a slot was
    reused. Half way between two anchors the earlier one takes the entry, which is the floor in
    Elastic Cache's Eq. 2 (arXiv 2407.18121). anchor, member (B, H, T) bool; position (B, H, T).
    """
    if use_triton(position, any_dtype=True):
        from kvbench.kernels import ordering

        return ordering.nearest_anchor(anchor, member, position)
    length = anchor.shape[-1]
    slot = oldest_first(position)
    rank = _inverse(slot)
    own = torch.arange(length, device=anchor.device).expand_as(anchor)
    is_anchor = anchor.gather(-1, slot)
    before = torch.where(is_anchor, own, -1).cummax(dim=-1).values
    after = torch.where(is_anchor, own, length).flip(-1).cummin(dim=-1).values.flip(-1)
    to_earlier = (before >= 0) & ((after == length) | (own - before <= after - own))
    nearest = torch.where(to_earlier, before, after)
    nearest = torch.where(member.gather(-1, slot) & (nearest < length), nearest, own)
    return slot.gather(-1, nearest).gather(-1, rank)


def draws(position: Tensor, row_seed: Tensor, stream: int) -> Tensor:
    """Return float32 in [0, 1) like `position` (B, H, ...): a number for each token of a head, whenever it is asked.

    row_seed (B,) is the sequence's, so that it draws the same alone and in a batch; stream: another one draws others.
    With the number of the layer and a seed for it, these are what the policy `random` ranks by.
    """
    rest = (1,) * (position.ndim - 2)
    heads = torch.arange(position.shape[1], device=position.device).view(1, -1, *rest)
    first = stream % (1 << 48) * position.shape[1]  # any seed, within 64 bits
    number = position + (first + heads + 1) * _MIX[0] + row_seed.view(-1, 1, *rest) * _MIX[1]
    mixed = (number ^ _shift(number, 30)) * _MIX[1]  # SplitMix64's finalizer, wrapping
    mixed = (mixed ^ _shift(mixed, 27)) * _MIX[2]
    return _shift(mixed ^ _shift(mixed, 31), 40).float() / 2.0**24


def gumbel(unit: Tensor) -> Tensor:
    """Return draws in [0, 1) as standard Gumbel numbers: added to logits, the largest is a draw by their softmax."""
    return -(-unit.clamp(min=2.0**-25).log()).log()


def _shift(number: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's is arithmetic."""
    return (number >> bits) & ((1 << (64 - bits)) - 1)
