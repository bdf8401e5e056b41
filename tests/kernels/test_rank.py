"""The search by halving finds the entry that sorting finds."""

from __future__ import annotations

import pytest
import torch

from kvbench.cache.selection import entry_before_newest, entry_of_rank
from kvbench.kernels.dispatch import kernels_forced

pytest.importorskip("triton", reason="triton is not installed")

ON = "cuda" if torch.cuda.is_available() else "cpu"


def some_positions(capacity: int) -> tuple[torch.Tensor, torch.Tensor, torch.Generator]:
    """Positions (2, 3, C) in random order with a fifth of the slots empty, and how many are held."""
    random = torch.Generator().manual_seed(capacity)
    position = torch.rand((2, 3, 3 * capacity), generator=random).argsort(-1)[..., :capacity]
    held = torch.rand(position.shape, generator=random) < 0.8
    held[..., 0] = True
    return torch.where(held, position, -1).to(ON), held.sum(-1).to(ON), random


@pytest.mark.parametrize("capacity", [1, 7, 40, 1100, 2050])
def test_it_finds_the_entry_that_sorting_finds(capacity: int) -> None:
    position, held, random = some_positions(capacity)
    rank = (torch.rand((2, 3), generator=random).to(ON) * held).long()
    with kernels_forced(True):
        found = entry_of_rank(position, rank)
    with kernels_forced(False):
        assert torch.equal(found, entry_of_rank(position, rank))


@pytest.mark.cover
@pytest.mark.parametrize("newer", [1, 2, 25, 3000])
@pytest.mark.parametrize("capacity", [1, 2, 3, 40, pytest.param(2050, marks=pytest.mark.long)])
def test_it_counts_back_from_the_newest_entry(capacity: int, newer: int) -> None:
    position, _, _ = some_positions(capacity)
    for sinks in (0, 1, 4):
        with kernels_forced(True):
            found = entry_before_newest(position, newer, sinks=sinks)
        with kernels_forced(False):
            assert torch.equal(found, entry_before_newest(position, newer, sinks=sinks))
        newest_first = [sorted((p for p in row.tolist() if p >= 0), reverse=True) for row in position.flatten(0, 1)]
        for slot, row, places in zip(found.flatten().tolist(), position.flatten(0, 1), newest_first, strict=True):
            behind = min(newer, len(places) - 1 - sinks)
            assert int(row[slot]) == places[max(behind, min(1, len(places) - 1))]
