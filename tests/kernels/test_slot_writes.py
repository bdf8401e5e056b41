"""Writing, freeing and finding by halving by kernel, beside the same in plain torch, on random slots."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbench.cache.selection import (
    age_rank,
    entry_before_newest,
    entry_of_rank,
    lowest,
    outside,
    protected_entries,
    protected_range,
)
from kvbench.cache.slots import NO_CHOICE, Entries, Slots
from kvbench.kernels import slot_writes
from kvbench.kernels.decode_step import rotate_later, rotate_rows
from kvbench.kernels.dispatch import kernels_forced
from kvbench.kernels.slot_writes import free_given, free_lowest, lowest_slot, write_slot
from tests.covering import share_of

pytest.importorskip("triton", reason="triton is not installed")


ON = "cuda" if torch.cuda.is_available() else "cpu"


def random_slots(seed: int, batch: int, heads: int, capacity: int) -> tuple[Slots, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    length = torch.randint(1, capacity, (batch, heads), generator=random)
    held = torch.arange(capacity) < length[..., None]
    order = torch.rand((batch, heads, 2 * capacity), generator=random).argsort(-1)[..., :capacity]
    position = torch.where(held, order, -1)
    entries = Entries(
        keys=torch.randn((batch, heads, capacity, 8), generator=random),
        values=torch.randn((batch, heads, capacity, 8), generator=random),
        position=position,
        kind=torch.ones(position.shape, dtype=torch.int8),
        mass=torch.randint(0, 4, position.shape, generator=random).float() / 4,  # few values, so many ties
    )
    slots = Slots(
        entries=entries,
        length=length,
        free=length.clone(),
        rank=age_rank(position).int(),
        in_place=torch.full((batch, heads), -2, dtype=torch.int32),  # what no kernel writes
        faults=torch.zeros(batch, heads, dtype=torch.int32),
    )
    moved = {name: getattr(entries, name).to(ON) for name in ("keys", "values", "position", "kind", "mass")}
    slots.entries = Entries(**moved)
    slots.length, slots.free, slots.faults = slots.length.to(ON), slots.free.to(ON), slots.faults.to(ON)
    assert slots.rank is not None
    assert slots.in_place is not None
    slots.rank, slots.in_place = slots.rank.to(ON), slots.in_place.to(ON)
    seen = torch.full((batch,), 2 * capacity + 1, device=ON)
    return slots, seen


def assert_same(ours: Slots, reference: Slots) -> None:
    for name in ("keys", "values", "position", "kind", "mass"):
        assert torch.equal(getattr(ours.entries, name), getattr(reference.entries, name)), name
    assert torch.equal(ours.length, reference.length)
    assert torch.equal(ours.free, reference.free)
    held = ours.entries.position >= 0
    assert ours.rank is not None
    assert torch.equal(ours.rank[held].long(), age_rank(ours.entries.position)[held])


def assert_places_are_known(ours: Slots, freed: torch.Tensor, seen: torch.Tensor) -> None:
    """Of heads that freed an entry: how many first slots are in place, if all others moved as the next query will."""
    position = ours.entries.position
    behind, held = position - age_rank(position), position >= 0
    next_query = (seen[:, None] - ours.length)[..., None]  # at position seen, with as many older as are held
    placed = (behind == 0) & held
    first = torch.arange(position.shape[-1], device=ON) < placed.sum(-1, keepdim=True)
    sound = ((placed == first) & (placed | (behind == next_query) | ~held)).all(-1)
    found = torch.where(sound, placed.sum(-1).int(), -1)
    assert torch.equal(ours.in_place, torch.where(freed, found, -2))


@settings(max_examples=share_of(20), deadline=None)
@given(
    seed=st.integers(0, 10**6),
    capacity=st.integers(2, 40),
    budget=st.integers(1, 30),
    num_sinks=st.integers(0, 4),
    num_recent=st.integers(0, 6),
    recent_fraction=st.sampled_from([0.0, 0.29, 0.5, 1.0]),
    by_layer=st.booleans(),
)
def test_a_step_by_kernels_is_the_step_in_plain_torch(
    seed: int, capacity: int, budget: int, num_sinks: int, num_recent: int, recent_fraction: float, by_layer: bool
) -> None:
    ours, seen = random_slots(seed, 2, 3, capacity)
    reference = copy.deepcopy(ours)
    key, value = torch.randn(2, 3, 1, 8, device=ON), torch.randn(2, 3, 1, 8, device=ON)
    write_slot(ours.columns(), key, value, seen, advance=False)
    reference.write(key, value, seen - 1)
    budgets = torch.tensor([budget, budget + 1], device=ON)
    score = torch.randint(0, 3, (2, 1 if by_layer else 3, capacity), device=ON).float()
    protection = {"num_sinks": num_sinks, "num_recent": num_recent, "recent_fraction": recent_fraction}
    chosen = lowest_slot(ours.columns(), score, budgets, *protected_range(seen, budgets, **protection))
    free_lowest(ours.columns(), score, budgets, *protected_range(seen, budgets, **protection))
    entries = reference.entries
    protected = protected_entries(entries.position, seen, budgets, **protection)
    whole = score.expand(entries.position.shape).masked_fill(protected, torch.inf)
    assert torch.equal(chosen, lowest(whole, entries.position))
    over = reference.length > budgets[:, None]
    reference.release(chosen, over)
    assert_same(ours, reference)
    assert_places_are_known(ours, over, seen)


@settings(max_examples=share_of(10), deadline=None)
@given(seed=st.integers(0, 10**6), capacity=st.integers(2, 40), advance=st.booleans(), own_tables=st.booleans())
def test_a_token_rotated_as_it_is_written_is_the_one_rotated_before(
    seed: int, capacity: int, advance: bool, own_tables: bool
) -> None:
    ours, seen = random_slots(seed, 2, 3, capacity)
    reference = copy.deepcopy(ours)
    queries, keys = (
        torch.randn(2, 1, 6, 8, device=ON).transpose(1, 2),
        torch.randn(2, 1, 3, 8, device=ON).transpose(1, 2),
    )
    values, angles = torch.randn(2, 3, 1, 8, device=ON), torch.rand(2 if own_tables else 1, 1, 8, device=ON)
    turned_queries, turned_keys = rotate_rows(queries, keys, angles.cos(), angles.sin())
    write_slot(reference.columns(), turned_keys, values, seen, advance=advance)
    keys, unturned = rotate_later(queries, keys, angles.cos(), angles.sin())
    write_slot(ours.columns(), keys, values, seen, advance=advance, unturned=unturned)
    torch.testing.assert_close(unturned.turned_queries, turned_queries, rtol=0, atol=0)
    assert torch.equal(ours.free, reference.free)
    assert torch.equal(ours.length, reference.length)
    assert torch.equal(ours.entries.position, reference.entries.position)
    assert torch.equal(ours.entries.keys, reference.entries.keys)
    assert torch.equal(ours.entries.values, reference.entries.values)


@settings(max_examples=share_of(10), deadline=None)
@given(seed=st.integers(0, 10**6), capacity=st.integers(2, 40), budget=st.integers(1, 30))
def test_a_given_victim_is_freed_where_the_budget_is_exceeded(seed: int, capacity: int, budget: int) -> None:
    ours, seen = random_slots(seed, 2, 3, capacity)
    reference = copy.deepcopy(ours)
    key, value = torch.randn(2, 3, 1, 8, device=ON), torch.randn(2, 3, 1, 8, device=ON)
    write_slot(ours.columns(), key, value, seen, advance=False)
    reference.write(key, value, seen - 1)
    budgets = torch.tensor([budget, budget + 1], device=ON)
    victim = (torch.rand(2, 3, device=ON) * reference.length).long()
    over = reference.length > budgets[:, None]
    free_given(ours.columns(), victim, budgets)
    reference.release(victim, over)
    assert_same(ours, reference)
    assert_places_are_known(ours, over, seen)


@pytest.mark.parametrize("capacity", [30, 600])
@pytest.mark.parametrize(("freed", "found"), [(4, 4), (20, -1), (0, -1), (3, 3)])
def test_sinks_are_in_place_while_a_window_goes_on_without_a_gap(
    freed: int, found: int, capacity: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four sinks and a window: the oldest of the window goes, or another one of it, or a sink."""
    monkeypatch.setattr(slot_writes, "_MOST_SLOTS", 256)
    ours, _ = random_slots(5, 1, 2, capacity)
    ours.length.fill_(capacity)
    ours.entries.position.copy_(torch.arange(capacity, device=ON) + 100 * (torch.arange(capacity, device=ON) >= 4))
    ours.keep_ranks(age_rank(ours.entries.position).int())
    ours.free.fill_(capacity - 1)  # where the newest was written
    budgets = torch.tensor([capacity - 1], device=ON)
    free_given(ours.columns(), torch.full((1, 2), freed, device=ON), budgets)
    assert ours.in_place is not None
    assert ours.in_place.tolist() == [[found] * 2]


def test_where_nothing_was_freed_before_all_older_ones_stay_in_place() -> None:
    ours, _ = random_slots(5, 1, 2, 9)
    ours.length.fill_(9)
    ours.entries.position.copy_(torch.arange(9, device=ON))
    ours.keep_ranks(age_rank(ours.entries.position).int())
    ours.free.fill_(8)  # where the newest was written
    free_given(ours.columns(), torch.tensor([[5, 8]], device=ON), torch.tensor([8], device=ON))
    assert ours.in_place is not None
    assert ours.in_place.tolist() == [[5, 8]]


_WILD = torch.tensor([torch.nan, -torch.inf, torch.inf, 0.0, 1.0, 2.0])


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), capacity=st.integers(2, 30), num_sinks=st.integers(0, 3), is_given=st.booleans())
def test_what_is_no_choice_is_noted_as_plain_torch_notes_it(
    seed: int, capacity: int, num_sinks: int, is_given: bool
) -> None:
    """NaN among scores that count, and given victims that are no slot; where there is none the victims are the same."""
    ours, seen = random_slots(seed, 2, 3, capacity)
    reference = copy.deepcopy(ours)
    random = torch.Generator().manual_seed(seed)
    budgets = torch.tensor([capacity // 2, 1], device=ON)
    over = reference.length > budgets[:, None]
    if is_given:
        victim = torch.randint(-2, capacity + 2, (2, 3), generator=random).to(ON)
        free_given(ours.columns(), victim, budgets)
    else:
        score = _WILD[torch.randint(0, 6 if seed % 3 else 36, (2, 3, capacity), generator=random).clamp(max=5)].to(ON)
        bounds = protected_range(seen, budgets, num_sinks=num_sinks, num_recent=0, recent_fraction=0.5)
        free_lowest(ours.columns(), score, budgets, *bounds)
        finite = score.clamp(max=torch.finfo(torch.float32).max)
        kept = outside(reference.entries.position, *bounds)
        victim = lowest(finite.masked_fill(kept, torch.inf), reference.entries.position)
        assert torch.equal(victim == NO_CHOICE, (score.isnan() & ~kept & (reference.entries.position >= 0)).any(-1))
    reference.release(victim, over)
    assert torch.equal(ours.faults, reference.faults)
    assert bool((ours.faults[~over] == 0).all())
    sound = ours.faults == 0
    for name in ("position", "keys"):
        assert torch.equal(getattr(ours.entries, name)[sound], getattr(reference.entries, name)[sound])
    assert torch.equal(ours.length, reference.length)
    assert torch.equal(ours.free[sound], reference.free[sound])


def test_a_policy_that_frees_nothing_takes_a_fresh_slot_each_time() -> None:
    ours, seen = random_slots(3, 2, 3, 9)
    before = ours.length.clone()
    write_slot(
        ours.columns(), torch.randn(2, 3, 1, 8, device=ON), torch.randn(2, 3, 1, 8, device=ON), seen, advance=True
    )
    assert torch.equal(ours.free, before + 1)
    assert torch.equal(ours.length, before + 1)


@pytest.mark.parametrize(("given", "has_rank", "wanted"), [(True, False, 1), (True, True, 2), (False, True, 2)])
def test_one_warp_frees_a_given_victim_and_more_only_where_they_wait_for_each_other(
    given: bool, has_rank: bool, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    warps = []

    class Noted:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *arguments, **constants: warps.append(constants["num_warps"])

    monkeypatch.setattr(slot_writes, "free_victim", Noted())
    ours, _ = random_slots(1, 2, 3, 9)
    columns = ours.columns() if has_rank else replace(ours.columns(), rank=None, in_place=None)
    budget = torch.tensor([4, 5], device=ON)
    if given:
        free_given(columns, torch.zeros_like(ours.free), budget)
    else:
        free_lowest(columns, torch.zeros(2, 3, 9, device=ON), budget, budget, budget)
    assert warps == [wanted]


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
