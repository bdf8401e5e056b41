"""What stays comes into slots, and joins others, by kernel as in plain torch, on random entries and plans."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbench.cache import Plan
from kvbench.cache.selection import nearest_anchor
from kvbench.cache.slots import EMPTY, Entries, settle
from kvbench.kernels.dispatch import kernels_forced
from tests.covering import share_of

pytest.importorskip("triton", reason="triton is not installed")

from kvbench.kernels import ordering, settling

ON = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def entries_and_plan(
    seed: int, length: int, width: int, dtype: torch.dtype, device: str = "cpu", joining: float = 0.7
) -> tuple[Entries, Plan]:
    """Entries of 2 rows and 2 heads out of token order, some empty with old mass; `joining` of them join a survivor."""
    torch.manual_seed(seed)
    position = torch.stack([torch.randperm(2 * length)[:length] for _ in range(4)]).view(2, 2, length)
    position[torch.rand(position.shape) < 0.2] = EMPTY
    position[..., 0] = 2 * length
    held = position >= 0
    keep = (torch.rand(held.shape) < 0.3) & held
    keep[..., 0] = True
    own = torch.arange(length).expand(held.shape)
    survivor = torch.stack(
        [row.nonzero()[:, 0][torch.randint(0, int(row.sum()), (length,))] for row in keep.view(4, -1)]
    )
    into = torch.where(torch.rand(held.shape) < joining, survivor.view_as(own), own)
    stored = torch.randn(2, length, 2, width, dtype=dtype).transpose(1, 2).to(device)
    entries = Entries(
        keys=stored,
        values=torch.randn(2, 2, length, width, dtype=dtype).to(device),
        position=position.to(device),
        kind=torch.randint(0, 3, position.shape, dtype=torch.int8).to(device),
        mass=torch.rand(position.shape).to(device),
    )
    return entries, Plan(keep=keep.to(device), merge_into=into.to(device))


def assert_merges_alike(entries: Entries, plan: Plan, capacity: int) -> None:
    with kernels_forced(True):
        ours = settle(entries, plan, capacity)
    with kernels_forced(False):
        reference = settle(entries, plan, capacity)
    filled = reference.entries.position >= 0
    assert torch.equal(ours.length, reference.length)
    assert torch.equal(ours.entries.position, reference.entries.position)
    assert torch.equal(ours.entries.kind, reference.entries.kind)
    # Both add in float32, in another order: a difference may turn one rounding to half precision.
    tolerance = 1e-6 if entries.keys.dtype == torch.float32 else 2 * torch.finfo(entries.keys.dtype).eps
    for name in ("keys", "values"):
        merged, expected = getattr(ours.entries, name)[filled], getattr(reference.entries, name)[filled]
        assert merged.dtype == expected.dtype
        torch.testing.assert_close(merged, expected, rtol=tolerance, atol=tolerance)
    assert ours.entries.mass is not None
    assert reference.entries.mass is not None
    torch.testing.assert_close(ours.entries.mass, reference.entries.mass, rtol=1e-5, atol=1e-6)


@settings(max_examples=share_of(15), deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32),
    length=st.integers(2, 40),
    width=st.sampled_from([3, 8, 20]),
    dtype=st.sampled_from(DTYPES),
    extra=st.integers(0, 3),
)
def test_buckets_become_their_means(seed: int, length: int, width: int, dtype: torch.dtype, extra: int) -> None:
    entries, plan = entries_and_plan(seed, length, width, dtype)
    assert_merges_alike(entries, plan, int(plan.keep.sum(-1).max()) + extra)


@settings(max_examples=share_of(24), deadline=None)
@given(
    seed=st.integers(0, 2**32),
    length=st.integers(1, 70),
    in_order=st.booleans(),
    empty=st.sampled_from([0.0, 0.2, 1.0]),
    planned=st.sampled_from(["none", "keeps", "joins"]),
    mass=st.sampled_from([None, torch.float32, torch.bfloat16]),
    noted=st.booleans(),
    block=st.sampled_from([(4096, 512), (32, 16)]),
    chunk=st.sampled_from([1, 4, 64]),
    data=st.data(),
)
def test_what_stays_comes_into_its_slots_by_age(
    seed: int,
    length: int,
    in_order: bool,
    empty: float,
    planned: str,
    mass: torch.dtype | None,
    noted: bool,
    block: tuple[int, int],
    chunk: int,
    data: st.DataObject,
) -> None:
    """Of a view of positions that all heads share, of slots that were used again, and of rows that hold nothing."""
    torch.manual_seed(seed)
    position = torch.rand(2, 1, length).argsort(-1) * 9
    position = position.sort(-1).values if in_order else position
    position = torch.where(torch.rand(2, 1, length) < empty, EMPTY, position).expand(2, 3, length)
    shape, keep = position.shape, (position >= 0) & (torch.rand(position.shape) < 0.4)
    entries = Entries(
        keys=torch.randn(*shape, 4, device=ON),
        values=torch.randn(*shape, 4, device=ON),
        position=position.to(ON),
        kind=torch.randint(0, 3, (2, 1, length), dtype=torch.int8, device=ON).expand(shape),
        mass=None if mass is None else torch.randint(0, 9, shape, device=ON).to(mass),
        noted=torch.randn(shape, device=ON) if noted else None,
    )
    target = keep.float().add(1e-9).flatten(0, 1).multinomial(length, replacement=True).view(shape)
    into = torch.where(keep.any(-1, keepdim=True), target, torch.arange(length)).to(ON) if planned == "joins" else None
    plan = None if planned == "none" else Plan(keep=keep.to(ON), merge_into=into)
    capacity = data.draw(st.integers(1, length + 3), label="capacity")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ordering, "_BLOCK", block[0])  # so that a row is walked along in several blocks
        patch.setattr(ordering, "_SORTED", block[1])
        patch.setattr(settling, "_CHUNK", chunk)
        with kernels_forced(True):
            ours = settle(entries, plan, capacity)
        with kernels_forced(False):
            reference = settle(entries, plan, capacity)
    filled = reference.entries.position >= 0
    assert torch.equal(ours.length, reference.length)
    for name in ("position", "kind", "mass", "noted"):
        one, other = getattr(ours.entries, name), getattr(reference.entries, name)
        assert (one is None and other is None) or (one.dtype == other.dtype and torch.equal(one, other)), name
    for name in ("keys", "values"):
        one, other = getattr(ours.entries, name), getattr(reference.entries, name)
        torch.testing.assert_close(one[filled], other[filled], rtol=1e-6, atol=1e-6)


def test_a_survivor_that_nobody_joins_goes_on_with_what_it_brings() -> None:
    entries, plan = entries_and_plan(0, 12, 4, torch.float32, joining=0.5)
    assert plan.merge_into is not None
    older = (torch.arange(12, device=ON) - 1).clamp(min=0).expand(plan.merge_into.shape)
    alone = Plan(
        keep=entries.position >= 0, merge_into=torch.arange(12, device=ON).expand(older.shape), merge_source=older
    )
    assert_merges_alike(entries, alone, 12)
    assert_merges_alike(entries, replace(plan, merge_source=older), 12)


def test_a_bucket_larger_than_a_tile_is_read_to_its_end() -> None:
    entries, plan = entries_and_plan(0, 110, 4, torch.float32, joining=1.0)
    assert plan.merge_into is not None
    one = Plan(keep=torch.arange(110).expand(2, 2, 110) == 0, merge_into=torch.zeros_like(plan.merge_into))
    assert_merges_alike(entries, one, 3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
def test_merging_at_a_real_size_is_exact_and_the_same_every_time(dtype: torch.dtype) -> None:
    entries, plan = entries_and_plan(1, 3000, 128, dtype, "cuda")
    capacity = int(plan.keep.sum(-1).max()) + 1
    assert_merges_alike(entries, plan, capacity)
    first, second = (settle(entries, plan, capacity) for _ in range(2))
    assert torch.equal(first.entries.keys, second.entries.keys)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("length", [1024, 32_768, 131_072])
def test_the_last_anchor_takes_in_most_of_a_prompt(length: int) -> None:
    """As where attention leans on first tokens: the anchors are the first fifth."""
    random, shape = torch.Generator("cuda").manual_seed(length), (1, 2, length)
    keys, values = (torch.randn(*shape, 128, device="cuda", dtype=torch.bfloat16, generator=random) for _ in "kv")
    position = torch.arange(length, device="cuda").expand(shape)
    kind, mass = torch.zeros(shape, dtype=torch.int8, device="cuda"), torch.rand(shape, device="cuda", generator=random)
    entries = Entries(keys=keys, values=values, position=position, kind=kind, mass=mass)
    keep, found = position < length // 5, []
    for by_kernels in (True, False):
        with kernels_forced(by_kernels):
            into = nearest_anchor(keep & (position > 0), position > 0, position)
            found.append(settle(entries, Plan(keep=keep, merge_into=into), length // 5 + 1).entries)
    ours, reference = found
    for name in ("keys", "values", "mass"):
        one, other = getattr(ours, name)[:, :, :-1].float(), getattr(reference, name)[:, :, :-1].float()
        torch.testing.assert_close(one, other, rtol=1e-2 if name != "mass" else 1e-3, atol=1e-4)
