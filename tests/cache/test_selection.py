"""Choosing entries, against the same thing in plain Python."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbench.cache.selection import age_rank, keep_top, lowest, nearest_anchor, protected_entries
from tests.covering import share_of
from tests.naive_rules import buckets

quick = settings(max_examples=share_of(150), deadline=None, derandomize=True)


@st.composite
def slots(draw: st.DrawFn) -> list[tuple[int, float]]:
    """(position or -1, score) per slot, in a storage order that is not the order of tokens; scores tie often."""
    length = draw(st.integers(1, 12))
    held = draw(st.lists(st.integers(0, 40), min_size=1, max_size=length, unique=True))
    positions = draw(st.permutations(held + [-1] * (length - len(held))))
    scores = st.sampled_from([-math.inf, -1.0, 0.0, 0.25, 3.0, math.inf])
    return [(position, draw(scores)) for position in positions]


def tensors(rows: list[tuple[int, float]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Score and position (1, 1, T)."""
    position = torch.tensor([p for p, _ in rows])[None, None]
    return torch.tensor([s for _, s in rows])[None, None], position


@quick
@given(rows=slots(), budget=st.integers(0, 14))
def test_keep_top_keeps_the_best_and_of_equals_the_newest(rows: list[tuple[int, float]], budget: int) -> None:
    score, position = tensors(rows)
    best = sorted((s, p) for p, s in rows if p >= 0)[::-1][:budget]
    keep = keep_top(score, position, torch.tensor([budget]))[0, 0]
    assert {p for (p, _), kept in zip(rows, keep.tolist(), strict=True) if kept} == {p for _, p in best}
    assert int(keep.sum()) == len(best)


@quick
@given(rows=slots())
def test_lowest_names_the_worst_and_of_equals_the_oldest(rows: list[tuple[int, float]]) -> None:
    score, position = tensors(rows)
    _, oldest = min((s, p) for p, s in rows if p >= 0)
    slot = int(lowest(score, position))
    assert rows[slot][0] == oldest


def test_rows_and_heads_choose_for_themselves() -> None:
    torch.manual_seed(0)
    score, budget = torch.rand(3, 2, 9), torch.tensor([2, 5, 9])
    position = torch.arange(9).expand(3, 2, 9)
    keep, victim = keep_top(score, position, budget), lowest(score, position)
    for row in range(3):
        for head in range(2):
            top = score[row, head].topk(int(budget[row])).indices.tolist()
            assert sorted(top) == keep[row, head].nonzero().flatten().tolist()
            assert int(victim[row, head]) == int(score[row, head].argmin())


@quick
@given(
    rows=slots(),
    budget=st.integers(1, 45),
    num_sinks=st.integers(0, 6),
    num_recent=st.integers(0, 6),
    hundredths=st.integers(0, 100),
)
def test_sinks_and_window_share_a_budget(
    rows: list[tuple[int, float]], budget: int, num_sinks: int, num_recent: int, hundredths: int
) -> None:
    _, position = tensors(rows)
    seen = 1 + int(position.max())
    sinks = min(num_sinks, budget - 1)
    recent = min(max(num_recent, math.floor(Fraction(hundredths, 100) * budget)), budget - sinks)
    protected = protected_entries(
        position,
        torch.tensor([seen]),
        torch.tensor([budget]),
        num_sinks=num_sinks,
        num_recent=num_recent,
        recent_fraction=hundredths / 100,
    )
    assert protected[0, 0].tolist() == [p >= 0 and (p < sinks or p >= seen - recent) for p, _ in rows]
    assert int(protected.sum()) <= budget


def test_a_share_of_the_budget_is_rounded_down_as_the_user_means_it() -> None:
    """0.29 of 100 is 29 although 0.29 * 100 is 28.999999999999996."""
    budgets = torch.arange(1, 2001)
    position = torch.arange(2001).expand(len(budgets), 1, 2001)
    seen = torch.full((len(budgets),), 2001)
    for hundredths in range(0, 101, 7):
        protected = protected_entries(
            position, seen, budgets, num_sinks=0, num_recent=0, recent_fraction=hundredths / 100
        )
        assert protected.sum(-1).flatten().tolist() == [budget * hundredths // 100 for budget in budgets.tolist()]


@quick
@given(rows=slots())
def test_age_rank_counts_older_entries(rows: list[tuple[int, float]]) -> None:
    _, position = tensors(rows)
    held = [p for p, _ in rows if p >= 0]
    ranks = age_rank(position)[0, 0].tolist()
    assert sorted(ranks) == list(range(len(rows)))
    for (p, _), rank in zip(rows, ranks, strict=True):
        assert rank == sum(older < p for older in held) if p >= 0 else rank >= len(held)


@quick
@given(rows=slots(), choice=st.lists(st.sampled_from(["anchor", "member", "neither"]), min_size=12, max_size=12))
def test_nearest_anchor_is_equation_two_on_the_line_of_ages(rows: list[tuple[int, float]], choice: list[str]) -> None:
    _, position = tensors(rows)
    by_age = sorted((p, slot) for slot, (p, _) in enumerate(rows) if p >= 0)
    anchors = [rank for rank, (_, slot) in enumerate(by_age) if choice[slot] == "anchor"]
    expected = list(range(len(rows)))
    for anchor, bucket in zip(anchors, buckets(anchors, len(by_age)), strict=True):
        for rank in bucket:
            slot = by_age[rank][1]
            expected[slot] = by_age[anchor][1] if choice[slot] != "neither" else slot
    is_anchor = torch.tensor([choice[slot] == "anchor" and p >= 0 for slot, (p, _) in enumerate(rows)])
    member = torch.tensor([choice[slot] != "neither" and p >= 0 for slot, (p, _) in enumerate(rows)])
    assert nearest_anchor(is_anchor[None, None], member[None, None], position)[0, 0].tolist() == expected


def test_half_way_between_two_anchors_goes_to_the_earlier_one() -> None:
    anchor = torch.tensor([[[False, True, False, False, False, True, False]]])
    everyone = torch.ones_like(anchor)
    assert nearest_anchor(anchor, everyone, torch.arange(7)[None, None])[0, 0].tolist() == [1, 1, 1, 1, 5, 5, 5]
