"""Choosing the best and ranking by age without sorting is what sorting gives."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvbench.cache import selection
from kvbench.kernels.dispatch import kernels_forced
from tests.covering import share_of

pytest.importorskip("triton", reason="triton is not installed")

from kvbench.kernels import ordering

ON = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_entries(seed: int, length: int, *, in_order: bool, heads: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Score with many ties and infinities, position with empty slots, budgets below, at and above what is held."""
    random = torch.Generator().manual_seed(seed)
    score = (
        torch.randint(-6, 7, (3, heads, length), generator=random).float()
        / 4
        * torch.tensor([1.0, -0.0, 1e-30])[seed % 3]
    )
    score = score.masked_fill(torch.rand(score.shape, generator=random) < 0.1, -math.inf)
    score = score.masked_fill(torch.rand(score.shape, generator=random) < 0.1, math.inf)
    position = torch.rand((3, heads, length), generator=random).argsort(-1) * 3
    position = position.sort(-1).values if in_order else position
    position = position.masked_fill(torch.rand(position.shape, generator=random) < 0.3, -1)
    return score.to(ON), position.to(ON), torch.tensor([max(1, length // 5), length, 1], device=ON)


def both(function: str, *arguments: Tensor) -> tuple[Tensor, Tensor]:
    with kernels_forced(True):
        ours = getattr(selection, function)(*arguments)
    with kernels_forced(False):
        return ours, getattr(selection, function)(*arguments)


@pytest.mark.cover
@pytest.mark.parametrize("length", [1, 40, pytest.param(130, marks=pytest.mark.long)])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("in_order", [True, False])
def test_what_is_kept_and_every_rank_are_those_of_sorting(
    length: int, seed: int, in_order: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ordering, "_BLOCK", 32)  # so that a row is read in several loads
    monkeypatch.setattr(ordering, "_RANKED", 32)
    score, position, budget = random_entries(seed, length, in_order=in_order)
    for function, arguments in (
        ("keep_top", (score.to(DTYPES[seed]), position, budget)),
        ("age_rank", (position,)),
        ("oldest_first", (position,)),
    ):
        ours, reference = both(function, *arguments)
        assert ours.dtype == reference.dtype
        assert torch.equal(ours, reference), function


def test_random_scores_are_chosen_bit_for_bit() -> None:
    score = torch.randn(2, 2, 300, generator=torch.Generator().manual_seed(5)).to(ON)
    position = torch.arange(300, device=ON).expand(2, 2, 300)  # a view without strides over rows and heads
    ours, reference = both("keep_top", score, position, torch.tensor([60, 299], device=ON))
    assert torch.equal(ours, reference)
    assert ours.sum(-1).tolist() == [[60, 60], [299, 299]]


def test_one_score_for_all_heads_is_taken() -> None:
    score = torch.randn(2, 1, 50, generator=torch.Generator().manual_seed(6)).to(ON)
    position = torch.arange(50, device=ON).expand(2, 3, 50)
    ours, reference = both("keep_top", score.expand(2, 3, 50), position, torch.tensor([9, 20], device=ON))
    assert torch.equal(ours, reference)


def test_every_head_may_keep_a_number_of_its_own() -> None:
    score, position, _ = random_entries(2, 30, in_order=False, heads=2)
    ours, reference = both("keep_top", score, position, torch.tensor([[1, 9], [0, 30], [12, 5]], device=ON))
    assert torch.equal(ours, reference)


def test_nothing_is_kept_where_a_score_of_a_held_entry_is_nan() -> None:
    score, position, budget = random_entries(0, 20, in_order=True, heads=2)
    position[0, 0, 3], position[1, 1, 4] = 7, -1
    score[0, 0, 3] = score[1, 1, 4] = math.nan
    position[0, 0, 4:] += 100
    ours, reference = both("keep_top", score, position, budget)
    assert torch.equal(ours, reference)
    assert not bool(ours[0, 0].any())
    assert bool(ours[1, 1].any()), "NaN in an empty slot is no score"


@settings(max_examples=share_of(60), deadline=None)
@given(
    seed=st.integers(0, 2**31),
    length=st.integers(1, 70),
    spacing=st.sampled_from([1, 40, 7000]),
    in_order=st.booleans(),
    anchors=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    empty=st.sampled_from([0.0, 0.2, 1.0]),
    flags_empty=st.booleans(),
    block=st.sampled_from([(4096, 512), (32, 16)]),
)
def test_every_entry_finds_the_anchor_that_sorting_finds(
    seed: int,
    length: int,
    spacing: int,
    in_order: bool,
    anchors: float,
    empty: float,
    flags_empty: bool,
    block: tuple[int, int],
) -> None:
    """Ties, empty slots that count as anchors or do not, rows of none, and slots that were used again."""
    random = torch.Generator().manual_seed(seed)
    position = torch.rand((2, 2, length), generator=random).argsort(-1) * spacing
    position = position.sort(-1).values if in_order else position
    position = position.masked_fill(torch.rand(position.shape, generator=random) < empty, -1)
    anchor, member = (torch.rand(position.shape, generator=random) < share for share in (anchors, 0.8))
    counts = (position >= 0) | flags_empty
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ordering, "_BLOCK", block[0])  # so that a row is walked along in several blocks
        patch.setattr(ordering, "_SORTED", block[1])
        ours, reference = both("nearest_anchor", *((one & counts).to(ON) for one in (anchor, member)), position.to(ON))
    assert ours.dtype == reference.dtype
    assert torch.equal(ours, reference)


@settings(max_examples=share_of(60), deadline=None)
@given(
    seed=st.integers(0, 2**31),
    length=st.integers(1, 70),
    kept=st.sampled_from([0.0, 0.3, 1.0]),
    empty=st.sampled_from([0.0, 0.2, 1.0]),
    wrong=st.sampled_from(["nothing", "empty", "nowhere", "below", "lost"]),
    joins=st.booleans(),
    exact=st.booleans(),
    block=st.sampled_from([4096, 16]),
)
def test_a_plan_is_looked_at_as_plain_torch_does(
    seed: int, length: int, kept: float, empty: float, wrong: str, joins: bool, exact: bool, block: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    share = torch.rand((2, 3, 2, length), generator=random)
    position = torch.where(share[:, :1, 0] < empty, -1, torch.arange(length)).expand(2, 3, length)
    keep = (share[:, :, 1] < kept) & ((position >= 0) | (wrong == "empty"))
    into = torch.arange(length).expand(2, 3, length).clone()
    if bool(keep.any(-1).all()):
        target = keep.float().flatten(0, 1).multinomial(length, replacement=True, generator=random).view(into.shape)
        into = torch.where(share[:, :, 1] < 0.8, target, into)
    place = int(torch.randint(0, length, (1,), generator=random))
    into[1, 2, place] = {"nowhere": length, "below": -3, "lost": (place + 1) % length}.get(wrong, into[1, 2, place])
    budget = torch.tensor([int(keep[0].sum(-1).max()), max(1, length // 3)])
    given_plan = (keep.to(ON), into.to(ON) if joins else None, position.to(ON), budget.to(ON))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ordering, "_BLOCK", block)  # so that a row is walked along in several blocks
        with kernels_forced(True):
            ours = selection.looked_at(*given_plan, exact=exact)
        with kernels_forced(False):
            reference = selection.looked_at(*given_plan, exact=exact)
    for one, other in zip(ours, reference, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other), (one, other)


@pytest.mark.parametrize("middle", [(), (3,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_only_what_is_held_and_no_number_is_told(middle: tuple[int, ...], dtype: torch.dtype) -> None:
    position = torch.arange(40, device=ON).expand(2, 2, 40).masked_fill(torch.arange(40, device=ON) < 7, -1)
    numbers = torch.full((2, 2, *middle, 40), math.inf, dtype=dtype, device=ON)
    for place, told in ((6, False), (7, True), (39, True)):
        wrong = numbers.clone()
        wrong[(1, 1, *(size - 1 for size in middle), place)] = math.nan
        assert [bool(one) for one in both("has_nan", wrong, position)] == [told, told]
    assert not any(both("has_nan", numbers, position))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64, torch.int64])
@pytest.mark.parametrize("by_layer", [True, False])
def test_only_what_is_protected_is_infinite_and_nan_stays(dtype: torch.dtype, by_layer: bool) -> None:
    random = torch.Generator().manual_seed(3)
    position = (torch.rand((2, 3, 60), generator=random).argsort(-1) - 9).clamp(min=-1).to(ON)
    score = torch.randn((60, 2, 1 if by_layer else 3), generator=random).permute(1, 2, 0)
    wild = torch.tensor([math.nan, math.inf, -math.inf, torch.finfo(torch.float32).max])
    if dtype.is_floating_point:
        score = torch.where(
            torch.rand(score.shape, generator=random) < 0.5, wild[position[:, : score.shape[1]].cpu() % 4], score
        )
    bounds = torch.tensor([4, 0], device=ON), torch.tensor([40, 51], device=ON)
    ours, reference = both("shielded", score.to(ON, dtype), position, *bounds)
    assert ours.dtype == reference.dtype
    torch.testing.assert_close(ours, reference, rtol=0, atol=0, equal_nan=True)


@settings(max_examples=share_of(60), deadline=None)
@given(
    budgets=st.lists(st.integers(1, 2**20), min_size=1, max_size=5),
    fraction=st.one_of(st.integers(0, 1000).map(lambda share: share / 1000), st.floats(0.0, 1.0)),
    num_sinks=st.integers(0, 6),
    num_recent=st.integers(0, 40),
    seed=st.integers(0, 2**31),
)
def test_what_is_protected_is_what_plain_torch_protects(
    budgets: list[int], fraction: float, num_sinks: int, num_recent: int, seed: int
) -> None:
    budget, random = torch.tensor(budgets, device=ON), torch.Generator().manual_seed(seed)
    seen, window = budget + 7, {"num_sinks": num_sinks, "num_recent": num_recent, "recent_fraction": fraction}
    offset = torch.randint(-30, 30, (len(budgets), 2, 40), generator=random).to(ON)
    found = []
    for by_kernels in (True, False):
        with kernels_forced(by_kernels):
            bounds = selection.protected_range(seen, budget, **window)
            near = torch.cat((offset[:, :1] + num_sinks, offset[:, 1:] + bounds[1][:, None, None]), dim=1).clamp(min=-1)
            protected = selection.protected_entries(near, seen, budget, **window)
            found.append([*bounds, protected, selection.outside(near[:, :1].expand_as(near), *bounds)])
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.mark.parametrize("hundredths", range(0, 101, 20))
def test_a_share_of_every_budget_is_rounded_as_plain_torch_rounds_it(hundredths: int) -> None:
    budget = torch.arange(1, 4000, device=ON)
    window = {"num_sinks": 2, "num_recent": 1, "recent_fraction": hundredths / 100 + 0.0009}
    with kernels_forced(True):
        ours = selection.protected_range(budget + 9, budget, **window)
    with kernels_forced(False):
        reference = selection.protected_range(budget + 9, budget, **window)
    assert all(torch.equal(one, other) for one, other in zip(ours, reference, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("length", [900, 1024, 5000, 32_768, 131_072])
@pytest.mark.parametrize("in_order", [True, False])
def test_the_nearest_anchors_at_real_sizes(length: int, in_order: bool) -> None:
    score, position, budget = random_entries(1, length, in_order=in_order)
    anchor = selection.keep_top(score + torch.rand_like(score), position, budget)
    ours, reference = both("nearest_anchor", anchor, position >= 0, position)
    assert torch.equal(ours, reference)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("length", [900, 1024, 5000, 32_768, 131_072])
@pytest.mark.parametrize("in_order", [True, False])
def test_at_real_sizes(length: int, in_order: bool) -> None:
    score, position, budget = random_entries(1, length, in_order=in_order)
    score += torch.rand_like(score)
    for function, arguments in (("keep_top", (score, position, budget)), ("age_rank", (position,))):
        ours, reference = both(function, *arguments)
        assert torch.equal(ours, reference), function
