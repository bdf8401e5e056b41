"""A golden answer of everything that decides what stays: whoever changes it raises `CACHE_SEMANTICS`."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from kvbench.cache import CACHE_SEMANTICS, Budget
from kvbench.cache import selection as choose
from kvbench.cache.released import entries_as_released
from kvbench.policies.released.choice import merge_with_lost_offset, slots_by_age, sorted_order_as_rank

# Raise CACHE_SEMANTICS together with the digest: records with unchanged policies are then measured again.
GOLDEN = {1: "2e439ab364bdac8f"}
B, H, T = 2, 2, 23


def _numbers(seed: int, below: int) -> Tensor:
    """Whole numbers (B, H, T), the same in every version of torch."""
    values = [(2654435761 * (index + 7919 * seed) >> 7) % below for index in range(B * H * T)]
    return torch.tensor(values).reshape(B, H, T)


def _positions() -> Tensor:
    """Slots in no order of age, some empty."""
    order = torch.tensor([(7 * slot + 3) % T for slot in range(T)]).expand(B, H, T).clone()
    order[0, :, 4] = -1
    order[1, 1, 9:12] = -1
    return order


def decisions() -> list[Tensor]:
    """What each rule of the cache decides about the same entries; scores tie often."""
    position, score = _positions(), _numbers(1, 6).float()
    budget, seen = torch.tensor([7, 11]), torch.tensor([T, T])
    window = {"num_sinks": 2, "num_recent": 3, "recent_fraction": 0.29}
    keep = choose.keep_top(score, position, budget)
    member = (position >= 0) & (_numbers(2, 3) > 0)
    nearest = choose.nearest_anchor(keep, member, position)
    count = budget[:, None].expand(B, H)
    return [
        keep,
        choose.lowest(score, position),
        choose.protected_entries(position, seen, budget, **window),
        *choose.protected_range(seen, budget, **window),
        choose.age_rank(position),
        choose.oldest_first(position),
        choose.entry_of_rank(position, torch.tensor([[0, 3], [5, 19]])),
        choose.entry_before_newest(position, 4, sinks=1),
        choose.entry_before_newest(position, 40, sinks=1),
        nearest,
        sorted_order_as_rank(score, position, first=1, count=count),
        slots_by_age(position),
        *merge_with_lost_offset(member & ~keep, nearest, position, offset=1),
        torch.tensor([[_entries(Budget(fraction=f, of=of), n) for n in range(1, 60)] for f in (0.1, 0.29, 0.7)
                      for of in ("seen", "prompt")]),
    ]  # fmt: skip


def _entries(budget: Budget, prompt: int) -> int:
    counts = {"seen_tokens": prompt + 5, "prompt_tokens": prompt}
    return 1000 * budget.entries(**counts) + entries_as_released(budget, **counts)


def test_what_the_cache_decides_is_what_its_declared_semantics_decide() -> None:
    digest = hashlib.sha256()
    for decision in decisions():
        digest.update(repr(decision.long().tolist()).encode())
    assert {CACHE_SEMANTICS: digest.hexdigest()[:16]} == GOLDEN
