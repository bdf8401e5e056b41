"""The search by halving finds the entry that sorting finds."""

from __future__ import annotations

import pytest
import torch

from kvbench.cache.selection import entry_of_rank
from kvbench.kernels.dispatch import kernels_forced

pytest.importorskip("triton", reason="triton is not installed")

ON = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("capacity", [1, 7, 40, 1100])
def test_it_finds_the_entry_that_sorting_finds(capacity: int) -> None:
    random = torch.Generator().manual_seed(capacity)
    position = torch.rand((2, 3, 3 * capacity), generator=random).argsort(-1)[..., :capacity]
    held = torch.rand(position.shape, generator=random) < 0.8
    held[..., 0] = True
    position = torch.where(held, position, -1).to(ON)
    rank = (torch.rand((2, 3), generator=random).to(ON) * held.sum(-1).to(ON)).long()
    with kernels_forced(True):
        found = entry_of_rank(position, rank)
    with kernels_forced(False):
        assert torch.equal(found, entry_of_rank(position, rank))
