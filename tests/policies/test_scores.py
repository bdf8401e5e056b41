"""Policies that only score, against their papers' definitions in plain Python on random caches."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvbench.cache import Policy, ScorePolicy, View, When
from kvbench.errors import ConfigError
from kvbench.policies.chunkkv import ChunkKV
from kvbench.policies.h2o_mean import H2OMean
from kvbench.policies.key_norm import KeyNorm
from kvbench.policies.keydiff import KeyDiff
from kvbench.policies.lagkv import LagKV
from kvbench.policies.scissorhands import Scissorhands
from kvbench.policies.tova import TOVA
from kvbench.policies.vatp import VATP
from tests import naive_scores as naive
from tests.covering import share_of
from tests.naive import Entry, Head, Where

ROWS, HEADS, WIDTH, WINDOW = 2, 2, 4, 7
PAIRS: dict[str, tuple[ScorePolicy, naive.Score]] = {
    "key_norm": (KeyNorm(), naive.key_norm),
    "vatp": (VATP(num_sinks=3), naive.vatp),
    "tova": (TOVA(), naive.tova),
    "h2o_mean": (H2OMean(), naive.h2o_mean),
    "keydiff": (KeyDiff(), naive.keydiff),
    "scissorhands": (Scissorhands(num_recent=3, history_tokens=6), naive.scissorhands(6)),
    "scissorhands_all": (Scissorhands(), naive.scissorhands(WINDOW)),
    "lagkv": (LagKV(num_sinks=2, lag_tokens=5), naive.LagKVRule(2, 5)),
    "lagkv_of_two": (LagKV(num_sinks=0, lag_tokens=2), naive.LagKVRule(0, 2)),
    "chunkkv": (ChunkKV(num_recent=4, chunk_tokens=3), naive.chunkkv(4, 3)),
    "chunkkv_of_one": (ChunkKV(num_recent=2, chunk_tokens=1), naive.chunkkv(2, 1)),
}


@dataclass(frozen=True, kw_only=True)
class Cache:
    """One layer twice: as a policy sees it, and as lists of entries [row][head] from the oldest to the newest."""

    view: View
    heads: list[list[Head]]

    def where(self, row: int) -> Where:
        return Where(layer=0, num_layers=1, seen=int(self.view.seen[row]), budget=int(self.view.budget[row]))


def cache_of(seed: int, lengths: list[int], policy: Policy, *, evicted: int, over: int | None) -> Cache:
    """Draw a cache whose row `r` holds lengths[r] entries in slots of any order; attention in whole sixteenths.

    policy: says whether heads hold the same. evicted: older tokens that were dropped before. over: entries
    above the budget, None for a budget drawn between 1 and what a row holds less one.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randint(0, 17, shape, generator=generator) / 16.0

    slots, prefill = max(lengths) + 2, over is None
    position = torch.full((ROWS, HEADS, slots), -1)
    keys, values = (torch.randn(ROWS, HEADS, slots, WIDTH, generator=generator) for _ in range(2))
    mass, window = draw(ROWS, HEADS, slots), draw(ROWS, HEADS, WINDOW, slots)
    heads: list[list[Head]] = []
    budgets = []
    for row, length in enumerate(lengths):
        seen = length + evicted
        budgets.append(
            int(torch.randint(1, length, (), generator=generator)) if over is None else max(1, length - over)
        )
        heads.append([])
        for head in range(HEADS):
            if head == 0 or policy.granularity == "kv_head":
                old = torch.randperm(seen - WINDOW, generator=generator)[evicted:].sort().values
                held = torch.cat((old, torch.arange(seen - WINDOW, seen)))
                slot = torch.randperm(slots, generator=generator)[:length]
            position[row, head, slot] = held
            for back in range(1, WINDOW + 1):  # a query sees nothing newer than itself
                window[row, head, WINDOW - back, slot[held > seen - back]] = 0.0
            rows = [window[row, head, :, at].tolist() for at in slot.tolist()]
            heads[row].append([
                Entry(
                    position=at,
                    key=keys[row, head, slot[index]],
                    value=values[row, head, slot[index]],
                    mass=float(mass[row, head, slot[index]]),
                    rows=([0.0] * (seen - at) + rows[index])[-(seen - at) :],
                )
                for index, at in enumerate(held.tolist())
            ])  # fmt: skip
    counts = torch.tensor([length + evicted for length in lengths])
    view = View(
        layer=0,
        num_layers=1,
        new_tokens=max(lengths) if prefill else 1,
        prefill=prefill,
        prompt=counts,
        seen=counts,
        budget=torch.tensor(budgets),
        prompt_budget=torch.tensor(budgets),
        row_seed=torch.zeros(ROWS, dtype=torch.int64),
        keys=keys,
        values=values,
        position=position,
        kind=torch.zeros_like(position, dtype=torch.int8),
        mass_or_none=mass,
        window_or_none=window if prefill else None,
        probs_or_none=window[:, :, -1],
    )
    return Cache(view=view, heads=heads)


def rule_of(policy: ScorePolicy, score: naive.Score) -> naive.NaiveScored:
    return naive.NaiveScored(
        score=score,
        num_sinks=policy.num_sinks,
        num_recent=policy.num_recent,
        recent_fraction=policy.recent_fraction,
    )


@pytest.mark.parametrize("name", PAIRS)
@settings(max_examples=share_of(60), deadline=None)
@given(seed=st.integers(0, 2**20), lengths=st.lists(st.integers(WINDOW + 1, 30), min_size=ROWS, max_size=ROWS))
def test_what_stays_of_a_prompt_is_what_the_paper_describes(name: str, seed: int, lengths: list[int]) -> None:
    policy, score = PAIRS[name]
    cache = cache_of(seed, lengths, policy, evicted=0, over=None)
    plan = policy.plan(cache.view)
    assert plan is not None
    for row in range(ROWS):
        rule = rule_of(policy, score)
        kept = rule.plan(cache.heads[row], cache.where(row))
        if rule.margin < 1e-5:
            continue
        for head in range(HEADS):
            found = sorted(cache.view.position[row, head][plan.keep[row, head]].tolist())
            assert found == [entry.position for entry in kept[head]]


@pytest.mark.parametrize("name", [name for name, (policy, _) in PAIRS.items() if When.DECODE in policy.when])
@settings(max_examples=share_of(60), deadline=None)
@given(seed=st.integers(0, 2**20), lengths=st.lists(st.integers(WINDOW + 1, 20), min_size=ROWS, max_size=ROWS))
def test_what_goes_at_decode_is_what_the_paper_describes(name: str, seed: int, lengths: list[int]) -> None:
    policy, score = PAIRS[name]
    cache = cache_of(seed, lengths, policy, evicted=9, over=1)
    victim = policy.victim(cache.view)
    for row in range(ROWS):
        for head in range(HEADS):
            rule = rule_of(policy, score)
            gone = rule.victim(cache.heads[row], head, cache.where(row))
            if rule.margin >= 1e-5:
                assert int(cache.view.position[row, head, victim[row, head]]) == gone.position


def test_large_keys_stay_where_they_are_asked_for() -> None:
    cache = cache_of(3, [20, 20], KeyNorm(), evicted=0, over=None)
    small, large = KeyNorm().score(cache.view), KeyNorm(keep="large").score(cache.view)
    assert torch.equal(small, -large)


def test_a_channel_that_does_not_vary_says_nothing() -> None:
    """Its least is its largest, so that nothing could be scaled to it."""
    cache = cache_of(4, [20, 20], LagKV(), evicted=0, over=None)
    cache.view.values[..., 0] = 2.5
    assert bool(LagKV(num_sinks=2, lag_tokens=5).score(cache.view).isfinite().all())


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (KeyNorm, {"keep": "small ones"}),
        (Scissorhands, {"history_tokens": 0}),
        (Scissorhands, {"history_tokens": 401}),
        (LagKV, {"lag_tokens": 1}),
        (LagKV, {"num_sinks": -1}),
        (ChunkKV, {"num_recent": 0}),
        (ChunkKV, {"num_recent": 33}),
        (ChunkKV, {"chunk_tokens": 0}),
    ],
)
def test_a_setting_out_of_range_is_refused(kind: type[Policy], wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        kind(**wrong)
