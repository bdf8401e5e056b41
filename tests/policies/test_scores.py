"""Policies that only score, against their papers' definitions in plain Python on random caches."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvbench.cache import Policy, ScorePolicy, View
from kvbench.cache.policy import steps_between_cuts
from kvbench.cache.positions import Rotation
from kvbench.cache.selection import draws
from kvbench.errors import ConfigError
from kvbench.policies.cake import Cake
from kvbench.policies.capkv import CapKV
from kvbench.policies.chunkkv import ChunkKV
from kvbench.policies.criticalkv import CriticalKV
from kvbench.policies.curdkv import CurDKV
from kvbench.policies.expected_attention import ExpectedAttention
from kvbench.policies.h2o_mean import H2OMean
from kvbench.policies.key_norm import KeyNorm
from kvbench.policies.keydiff import KeyDiff
from kvbench.policies.keyformer import Keyformer
from kvbench.policies.lagkv import LagKV
from kvbench.policies.nacl import NACL
from kvbench.policies.r_kv import RKV
from kvbench.policies.random import Random
from kvbench.policies.scissorhands import Scissorhands
from kvbench.policies.simlayerkv import SimLayerKV
from kvbench.policies.snapkv_decode import SnapKVDecode
from kvbench.policies.tova import TOVA
from kvbench.policies.vase import VaSE
from kvbench.policies.vatp import VATP
from tests import naive_scores as naive
from tests.covering import share_of
from tests.naive import Entry, Head, Where
from tests.naive_rules import drawn_bits

ROWS, HEADS, GROUP, WIDTH, WINDOW = 2, 2, 2, 4, 7
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
    "r_kv": (RKV(num_recent=3), naive.r_kv(3, 0.1, 7, 0.5)),
    "r_kv_attention": (
        RKV(num_recent=2, weight=0.9, kernel_tokens=3, similar=0.2),
        naive.r_kv(2, 0.9, 3, 0.2),
    ),
    "snapkv_decode": (SnapKVDecode(num_recent=4, kernel_tokens=3), naive.snapkv(4, 3, max)),
    "snapkv_decode_mean": (
        SnapKVDecode(num_recent=2, kernel_tokens=5, pooling="avg"),
        naive.snapkv(2, 5, lambda near: sum(near) / 5),
    ),
    "cake": (Cake(num_recent=4), naive.cake(4, 200.0, 5)),
    "cake_mean": (Cake(num_recent=3, gamma=0.0, kernel_tokens=1), naive.cake(3, 0.0, 1)),
    "simlayerkv": (SimLayerKV(num_sinks=2, num_recent=3), naive.newest),
    "curdkv": (CurDKV(num_sinks=2, run_tokens=5), naive.curdkv(5)),
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
    mass, head_rows = draw(ROWS, HEADS, slots), draw(ROWS, HEADS, GROUP, WINDOW, slots)
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
                head_rows[row, head, :, WINDOW - back, slot[held > seen - back]] = 0.0
            by_head = [head_rows[row, head, :, :, at].tolist() for at in slot.tolist()]
            rows = [head_rows[row, head, :, :, at].mean(dim=0).tolist() for at in slot.tolist()]
            heads[row].append([
                Entry(
                    position=at,
                    key=keys[row, head, slot[index]],
                    value=values[row, head, slot[index]],
                    mass=float(mass[row, head, slot[index]]),
                    rows=([0.0] * (seen - at) + rows[index])[-(seen - at) :],
                    by_head=by_head[index],
                )
                for index, at in enumerate(held.tolist())
            ])  # fmt: skip
    window = head_rows.mean(dim=2)
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
        head_rows_or_none=head_rows if prefill else None,
    )
    return Cache(view=view, heads=heads)


def rule_of(policy: ScorePolicy, score: naive.Score) -> naive.NaiveScored:
    return naive.NaiveScored(
        score=score,
        num_sinks=policy.num_sinks,
        num_recent=policy.num_recent,
        recent_fraction=policy.recent_fraction,
        exact=not isinstance(policy, Cake),
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


@pytest.mark.parametrize("name", [name for name, (policy, _) in PAIRS.items() if steps_between_cuts(policy) == 1])
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


@settings(max_examples=share_of(40), deadline=None)
@given(
    seed=st.integers(0, 2**20),
    lengths=st.lists(st.integers(WINDOW + 1, 30), min_size=ROWS, max_size=ROWS),
    share=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_half_of_criticalkv_is_snapkv_and_half_is_by_projected_values(
    seed: int, lengths: list[int], share: float
) -> None:
    policy = CriticalKV(num_recent=3, kernel_tokens=3, first_share=share)
    cache = cache_of(seed, lengths, policy, evicted=0, over=None)
    weights = torch.randn(HEADS, GROUP, WIDTH, 5, generator=torch.Generator().manual_seed(seed))
    view = replace(cache.view, output_weight_or_none=weights)
    plan = policy.plan(view)
    assert plan is not None
    for row in range(ROWS):
        where = cache.where(row)
        first = math.floor(Fraction(str(share)) * max(0, where.budget - 3))
        rule = rule_of(policy, naive.criticalkv(3, 3, first, 1e-4, weights))
        kept = rule.plan(cache.heads[row], where)
        if rule.margin < 1e-5:
            continue
        for head in range(HEADS):
            found = sorted(cache.view.position[row, head][plan.keep[row, head]].tolist())
            assert found == [entry.position for entry in kept[head]]


@settings(max_examples=share_of(40), deadline=None)
@given(
    seed=st.integers(0, 2**20),
    lengths=st.lists(st.integers(WINDOW + 1, 20), min_size=ROWS, max_size=ROWS),
    covariance=st.booleans(),
)
def test_expected_attention_is_that_of_the_mean_query_turned_to_each_place_to_come(
    seed: int, lengths: list[int], covariance: bool
) -> None:
    """The mean rotation as a mean of matrices, products as loops over channels."""
    policy = ExpectedAttention(future_tokens=5, covariance=covariance, epsilon=0.01)
    view = cache_of(seed, lengths, policy, evicted=0, over=None).view
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(ROWS, HEADS, GROUP, WIDTH, generator=generator)
    root = torch.randn(ROWS, HEADS, GROUP, WIDTH, WIDTH, generator=generator)
    spread, frequencies = root @ root.transpose(-1, -2), [1.0, 0.3]
    rotation = Rotation(frequencies=torch.tensor(frequencies))
    moments = {"query_mean_or_none": mean, "query_covariance_or_none": spread, "rotation_or_none": rotation}
    score = policy.score(replace(view, **moments))
    for row in range(ROWS):
        places = [lengths[row] + ahead for ahead in range(5)]
        for head in range(HEADS):
            held = [slot for slot in range(view.position.shape[2]) if view.position[row, head, slot] >= 4]
            wanted = dict.fromkeys(held, 0.01)
            for member in range(GROUP):
                turned = naive.mean_rotation(places, frequencies)
                logits = [
                    naive.expected_logit(view.keys[row, head, slot].tolist(), turned, mean[row, head, member].tolist(),
                                         spread[row, head, member].tolist() if covariance else None)
                    for slot in held
                ]  # fmt: skip
                for slot, share in zip(held, naive.softmax(logits), strict=True):
                    wanted[slot] += share / GROUP
            for slot, share in wanted.items():
                worth = share * math.hypot(*view.values[row, head, slot].tolist())
                assert float(score[row, head, slot]) == pytest.approx(worth, rel=1e-3)
            sinks = (view.position[row, head] >= 0) & (view.position[row, head] < 4)
            assert bool((score[row, head][sinks] == torch.inf).all())


def noise_of(stream: int, token: int) -> float:
    """Gumbel noise from what a sequence with seed 0 draws for a token in the one layer."""
    return -math.log(-math.log(max(drawn_bits(token, stream), 0.5) / 2.0**24))


@settings(max_examples=share_of(24), deadline=None)
@given(
    seed=st.integers(0, 2**20),
    lengths=st.lists(st.integers(WINDOW + 1, 20), min_size=ROWS, max_size=ROWS),
    generated=st.integers(0, 4),
)
def test_keyformer_is_a_gumbel_softmax_of_each_query_that_grows_warmer(
    seed: int, lengths: list[int], generated: int
) -> None:
    policy = Keyformer(temperature_step=0.2, seed=3)
    cache = cache_of(seed, lengths, policy, evicted=0, over=None)
    view = replace(cache.view, prompt=cache.view.seen - generated)
    score = policy.score(view)

    def noise(head: int, member: int, query: int, token: int) -> float:
        return noise_of((3 * GROUP + member) * HEADS + head, token + (query << 32))

    for row in range(ROWS):
        seen = lengths[row]
        wanted = naive.keyformer(noise, seen - generated, seen, 0.2)(cache.heads[row])
        for head in range(HEADS):
            slots = {int(at): slot for slot, at in enumerate(view.position[row, head]) if at >= 0}
            for entry, share in zip(cache.heads[row][head], wanted[head], strict=True):
                assert float(score[row, head, slots[entry.position]]) == pytest.approx(share, rel=1e-3, abs=1e-5)


@settings(max_examples=share_of(40), deadline=None)
@given(
    seed=st.integers(0, 2**20),
    lengths=st.lists(st.integers(WINDOW + 1, 30), min_size=ROWS, max_size=ROWS),
    share=st.sampled_from([0.0, 0.25, 0.8, 1.0]),
)
def test_vase_keeps_the_widest_values_and_draws_the_others_anew_at_each_plan(
    seed: int, lengths: list[int], share: float
) -> None:
    policy = VaSE(num_sinks=2, num_recent=4, large_fraction=share, kernel_tokens=3, seed=5)
    cache = cache_of(seed, lengths, policy, evicted=0, over=None)
    plan = policy.plan(cache.view)
    assert plan is not None
    for row in range(ROWS):
        where = cache.where(row)
        large = min(math.floor(Fraction(str(share)) * where.budget), max(0, where.budget - 4))
        later = where.seen << 24
        rule = rule_of(
            policy, naive.vase(lambda head, token, by=later: noise_of(5 * HEADS + head, token + by), 4, large, 3, 2)
        )
        kept = rule.plan(cache.heads[row], where)
        if rule.margin < 1e-5:
            continue
        for head in range(HEADS):
            found = sorted(cache.view.position[row, head][plan.keep[row, head]].tolist())
            assert found == [entry.position for entry in kept[head]]


@settings(max_examples=share_of(30), deadline=None)
@given(
    seed=st.integers(0, 2**20),
    lengths=st.lists(st.integers(WINDOW + 1, 20), min_size=ROWS, max_size=ROWS),
    tau=st.sampled_from([0.0, 1.0, 5.0]),
)
def test_capkv_is_the_weighted_leverage_of_values_by_the_mean_query_turned_ahead(
    seed: int, lengths: list[int], tau: float
) -> None:
    policy = CapKV(future_tokens=5, tau=tau)
    cache, frequencies = cache_of(seed, lengths, policy, evicted=0, over=None), [1.0, 0.3]
    mean = torch.randn(ROWS, HEADS, GROUP, WIDTH, generator=torch.Generator().manual_seed(seed))
    rotation = Rotation(frequencies=torch.tensor(frequencies))
    view = replace(cache.view, query_mean_or_none=mean, rotation_or_none=rotation)
    score = policy.score(view)
    for row in range(ROWS):
        turned = torch.tensor(naive.mean_rotation([lengths[row] + ahead for ahead in range(5)], frequencies))
        for head in range(HEADS):
            judged = [e for e in cache.heads[row][head] if e.position >= 4]
            anchors = (mean[row, head] @ turned.T).tolist()
            slots = {int(at): slot for slot, at in enumerate(view.position[row, head]) if at >= 0}
            for entry, worth in zip(judged, naive.capkv(judged, anchors, tau, 1e-6), strict=True):
                assert float(score[row, head, slots[entry.position]]) == pytest.approx(worth, rel=1e-3, abs=1e-6)
            assert all(float(score[row, head, slots[at]]) == math.inf for at in slots if at < 4)


@settings(max_examples=share_of(40), deadline=None)
@given(
    seed=st.integers(0, 2**20),
    lengths=st.lists(st.integers(WINDOW + 1, 30), min_size=ROWS, max_size=ROWS),
    share=st.sampled_from([0.0, 0.37, 1.0]),
)
def test_nacl_keeps_the_best_by_its_proxies_and_draws_the_others(seed: int, lengths: list[int], share: float) -> None:
    policy = NACL(num_sinks=2, recent_fraction=0.25, proxy_fraction=0.2, random_share=share, seed=5)
    cache = cache_of(seed, lengths, policy, evicted=0, over=None)
    plan = policy.plan(cache.view)
    assert plan is not None
    for row in range(ROWS):
        where = cache.where(row)
        sinks = min(2, where.budget - 1)
        recent = min(math.floor(Fraction(1, 4) * where.budget), where.budget - sinks)
        free, proxies = where.budget - sinks - recent, max(1, math.floor(Fraction(1, 5) * where.seen))
        best = free - math.floor(Fraction(str(share)) * free)

        rule = rule_of(
            policy,
            naive.nacl(
                lambda head, token: noise_of(5 * HEADS + head, token), sinks, where.seen - recent, proxies, best
            ),
        )
        kept = rule.plan(cache.heads[row], where)
        if rule.margin < 1e-5:
            continue
        for head in range(HEADS):
            found = sorted(cache.view.position[row, head][plan.keep[row, head]].tolist())
            assert found == [entry.position for entry in kept[head]]


@pytest.mark.long
def test_nacl_draws_by_the_softmax_of_scores() -> None:
    """One of twenty is drawn, by two thousand seeds."""
    view = cache_of(3, [20, 20], NACL(), evicted=0, over=None).view
    policy, budget = NACL(num_sinks=0, recent_fraction=0.0, proxy_fraction=0.2, random_share=1.0), torch.tensor([1, 1])
    count = torch.zeros(ROWS, HEADS, 22)
    for seed in range(2000):
        plan = replace(policy, seed=seed).plan(replace(view, budget=budget))
        assert plan is not None
        count += plan.keep
    wanted = view.window[:, :, -4:].sum(dim=2).masked_fill(~view.valid, -torch.inf).softmax(dim=-1) * 2000
    chi_square = ((count - wanted) ** 2 / wanted.clamp(min=1e-9)).masked_fill(~view.valid, 0.0).sum(dim=-1)
    assert float(chi_square.max()) < 46  # 99.95 % quantile with 19 degrees of freedom


def test_draws_are_those_of_the_policy_random() -> None:
    view = cache_of(3, [20, 9], KeyNorm(), evicted=0, over=None).view
    view = replace(view, row_seed=torch.tensor([7, -2]), layer=2, num_layers=4)
    drawn = draws(view.position, view.row_seed, 5 * 4 + 2)
    assert torch.equal(drawn, Random(seed=5).score(view))
    wide = draws(view.position[:, :, None].expand(-1, -1, 3, -1), view.row_seed, 5 * 4 + 2)
    assert torch.equal(wide[:, :, 1], drawn)


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
        (RKV, {"num_recent": 9}),
        (RKV, {"every_tokens": 1}),
        (SnapKVDecode, {"every_tokens": 1}),
        (SnapKVDecode, {"num_recent": 0}),
        (SnapKVDecode, {"kernel_tokens": 2}),
        (SnapKVDecode, {"pooling": "sum"}),
        (CriticalKV, {"num_recent": 0}),
        (CriticalKV, {"kernel_tokens": 2}),
        (CriticalKV, {"pooling": "sum"}),
        (RKV, {"weight": 1.5}),
        (RKV, {"kernel_tokens": 4}),
        (RKV, {"similar": -0.1}),
        (ExpectedAttention, {"future_tokens": 0}),
        (ExpectedAttention, {"epsilon": -1.0}),
        (CriticalKV, {"first_share": 1.1}),
        (CriticalKV, {"epsilon": math.nan}),
        (Keyformer, {"history_tokens": 0}),
        (Keyformer, {"temperature": 0.0}),
        (Keyformer, {"temperature_step": -1.0}),
        (Keyformer, {"every_tokens": 1}),
        (NACL, {"proxy_fraction": 1.5}),
        (NACL, {"random_share": -0.5}),
        (Cake, {"num_recent": 33}),
        (Cake, {"gamma": -1.0}),
        (Cake, {"kernel_tokens": 2}),
    ],
)
def test_a_setting_out_of_range_is_refused(kind: type[Policy], wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        kind(**wrong)
