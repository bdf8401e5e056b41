"""Settling and the reuse of slots, against plain lists."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbench.cache import Plan
from kvbench.cache.slots import EMPTY, Entries, settle
from tests.covering import share_of

quick = settings(max_examples=share_of(100), deadline=None, derandomize=True)


def random_entries(seed: int, length: int) -> Entries:
    """Entries of 2 rows and 2 heads in shuffled order of storage, some slots empty."""
    torch.manual_seed(seed)
    position = torch.stack([torch.randperm(30)[:length] for _ in range(4)]).view(2, 2, length)
    position[torch.rand(position.shape) < 0.2] = EMPTY
    position[..., 0] = 40
    return Entries(
        keys=torch.randn(2, 2, length, 3),
        values=torch.randn(2, 2, length, 3),
        position=position,
        kind=torch.randint(0, 3, position.shape, dtype=torch.int8),
        mass=torch.rand(position.shape),
    )


@quick
@given(seed=st.integers(0, 2**32), length=st.integers(1, 10), merging=st.booleans(), extra=st.integers(0, 4))
def test_settling_keeps_merges_and_orders_as_lists_do(seed: int, length: int, merging: bool, extra: int) -> None:
    entries = random_entries(seed, length)
    held = entries.position >= 0
    keep = (torch.rand(held.shape) < 0.6) & held
    keep[..., 0] = True
    own = torch.arange(length).expand(held.shape)
    survivor = torch.where(keep, own, 0)
    into = torch.where(held & (torch.rand(held.shape) < 0.5), survivor, own)
    expected = {
        (b, h): naive_settled(entries, keep, into if merging else own, b, h) for b in range(2) for h in range(2)
    }
    before = entries.keys.clone()
    slots = settle(entries, Plan(keep=keep, merge_into=into if merging else None), length + extra)
    assert torch.equal(before, entries.keys)
    assert slots.capacity == length + extra
    assert torch.equal(slots.free, slots.length)
    for (b, h), rows in expected.items():
        assert int(slots.length[b, h]) == len(rows)
        positions = slots.entries.position[b, h].tolist()
        assert positions == [row[0] for row in rows] + [EMPTY] * (length + extra - len(rows))
        for slot, (_, kind, key, value, mass) in enumerate(rows):
            assert int(slots.entries.kind[b, h, slot]) == kind
            torch.testing.assert_close(slots.entries.keys[b, h, slot].double(), key, rtol=0, atol=1e-5)
            torch.testing.assert_close(slots.entries.values[b, h, slot].double(), value, rtol=0, atol=1e-5)
            assert slots.entries.mass is not None
            assert abs(float(slots.entries.mass[b, h, slot]) - mass) < 1e-5


def naive_settled(entries: Entries, keep: torch.Tensor, into: torch.Tensor, b: int, h: int) -> list[tuple]:  # type: ignore[type-arg]
    assert entries.mass is not None
    rows = []
    for slot, position in enumerate(entries.position[b, h].tolist()):
        if not keep[b, h, slot]:
            continue
        parts = [t for t, target in enumerate(into[b, h].tolist()) if target == slot and entries.position[b, h, t] >= 0]
        key = entries.keys[b, h, parts].double().mean(0)
        value = entries.values[b, h, parts].double().mean(0)
        rows.append((position, int(entries.kind[b, h, slot]), key, value, float(entries.mass[b, h, parts].sum())))
    return sorted(rows, key=lambda row: row[0])


def test_the_victims_slot_takes_the_next_token_and_starts_from_nothing() -> None:
    entries = random_entries(0, 4)
    entries.position = torch.arange(4).expand(2, 2, 4).clone()
    slots = settle(entries, None, 5)
    storage = slots.entries.keys.data_ptr()
    slots.write(torch.ones(2, 2, 1, 3), torch.ones(2, 2, 1, 3), torch.tensor([4, 4]))
    victim = torch.tensor([[0, 1], [2, 3]])
    over = torch.tensor([[True, True], [True, False]])
    slots.release(victim, over)
    assert slots.free.tolist() == [[0, 1], [2, 5]]
    assert slots.length.tolist() == [[4, 4], [4, 5]]
    assert slots.entries.position.gather(2, victim[..., None])[..., 0].tolist() == [[-1, -1], [-1, 3]]
    slots.grow(1)
    slots.write(torch.full((2, 2, 1, 3), 7.0), torch.ones(2, 2, 1, 3), torch.tensor([5, 5]))
    assert slots.entries.mass is not None
    for b, h, slot in ((0, 0, 0), (0, 1, 1), (1, 0, 2), (1, 1, 5)):
        assert int(slots.entries.position[b, h, slot]) == 5
        assert float(slots.entries.keys[b, h, slot].sum()) == 21.0
        assert float(slots.entries.mass[b, h, slot]) == 0.0
        assert int(slots.entries.kind[b, h, slot]) == 0
    assert slots.entries.keys.data_ptr() != storage
