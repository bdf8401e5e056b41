"""The published divisions against plain loops over what a model's layers told, and their contract on models."""

from __future__ import annotations

import importlib
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvbench.cache import Allocation, Budget, Kind, Needs, PolicyCache, Room, View
from kvbench.cache.layer import PolicyLayer
from kvbench.cache.parts import layer_entries
from kvbench.contract.driving import drive
from kvbench.errors import ConfigError
from kvbench.policies.allocation.cake import Cake
from kvbench.policies.allocation.d2o import D2O
from kvbench.policies.allocation.lazy_layers import LazyLayers
from kvbench.policies.allocation.prefix import Prefix
from kvbench.policies.allocation.threshold import GlobalThreshold
from kvbench.policies.allocation.vl_cache import VLCache
from kvbench.policies.duo_attention import DuoAttention
from kvbench.policies.h2o import H2O
from kvbench.policies.merge.nearest_cosine import NearestCosine
from kvbench.policies.snapkv import SnapKV
from kvbench.policies.streaming_llm import StreamingLLM
from tests.calibrating import in_process
from tests.covering import share_of
from tests.tiny_models import random_tokens, tiny_model

PARTS = sorted((Path(__file__).parents[2] / "conf" / "policy" / "allocation").glob("*.yaml"))
LAYERS, HEADS, TOKENS = 3, 2, 20
quick = settings(max_examples=share_of(40), deadline=None, derandomize=True)


def allocation_of(path: Path) -> Allocation | None:
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    if "_target_" not in given:
        return None
    module, _, name = given.pop("_target_").rpartition(".")
    made: Allocation = getattr(importlib.import_module(module), name)(**given)
    return made


def random_views(seed: int, protected: int) -> tuple[list[View], list[Tensor]]:
    """One row of each layer: its statistics, and a ranking in which the last `protected` entries are infinite."""
    torch.manual_seed(seed)
    views, rankings = [], []
    position = torch.arange(TOKENS).expand(1, HEADS, TOKENS)
    one = torch.tensor([TOKENS])
    for layer in range(LAYERS):
        window = (4 * torch.rand(1) * torch.randn(1, HEADS, 4, TOKENS)).softmax(-1)
        views.append(
            View(
                layer=layer,
                num_layers=LAYERS,
                new_tokens=TOKENS,
                prefill=True,
                prompt=one,
                seen=one,
                budget=one,
                prompt_budget=one,
                row_seed=one,
                keys=torch.randn(1, HEADS, TOKENS, 4),
                values=torch.randn(1, HEADS, TOKENS, 4),
                position=position,
                kind=torch.zeros(1, HEADS, TOKENS, dtype=torch.int8),
                mass_or_none=torch.rand(1, HEADS, TOKENS) ** 4,
                window_or_none=window,
                probs_or_none=window[:, :, -1],
            )
        )
        ranking = torch.randint(0, 50, (1, HEADS, TOKENS)).float() + 20 * layer
        rankings.append(ranking.masked_fill(position >= TOKENS - protected, torch.inf))
    return views, rankings


def divided(allocation: Allocation, views: list[View], rankings: list[Tensor], room: Room) -> list[int]:
    told = [allocation.tell(view, ranking)[0].double() for view, ranking in zip(views, rankings, strict=True)]
    return list(layer_entries(allocation, (), room, told))


def room_of(budget: int, protected: int) -> Room:
    return Room(num_layers=LAYERS, num_heads=HEADS, budget=budget, tokens=TOKENS, protected=protected)


@quick
@given(seed=st.integers(0, 2**32), budget=st.integers(3, 19), protected=st.integers(1, 3))
def test_every_layer_keeps_the_same_share_of_its_attention(seed: int, budget: int, protected: int) -> None:
    views, rankings = random_views(seed, protected)
    shares = divided(Prefix(), views, rankings, room_of(budget, protected))
    assert sum(shares) == LAYERS * budget
    reached = []
    for view in views:
        mass = view.mass[0].double().mean(dim=0).tolist()
        for place, received in enumerate(mass[: TOKENS - protected]):  # those that are protected hold attention too
            before = sum(other for other in mass if other > received) / sum(mass)
            reached.append((before, view.layer, place))
    taken = [layer for _, layer, _ in sorted(reached)[: LAYERS * (budget - protected)]]
    assert shares == [protected + taken.count(layer) for layer in range(LAYERS)]


@quick
@given(seed=st.integers(0, 2**32), budget=st.integers(3, 19), protected=st.integers(1, 3))
def test_one_threshold_counts_the_best_of_the_model(seed: int, budget: int, protected: int) -> None:
    views, rankings = random_views(seed, protected)
    shares = divided(GlobalThreshold(), views, rankings, room_of(budget, protected))
    assert sum(shares) == LAYERS * budget
    scores = [(-s, n) for n, r in enumerate(rankings) for s in r.flatten().tolist() if math.isfinite(s)]
    best = [layer for _, layer in sorted(scores)[: LAYERS * HEADS * (budget - protected)]]
    for layer, share in enumerate(shares):
        assert abs(share - protected - best.count(layer) / HEADS) < 1
    free = torch.tensor([sum(r.isfinite().sum().item() for r in rankings[:1]) // 2])
    candidates = rankings[0].masked_fill(rankings[0].isinf(), -torch.inf)
    counts = GlobalThreshold().heads(views[0], candidates, free)[0].tolist()
    ranked = sorted((-float(candidates[0, h, t]), -t, h) for h in range(HEADS) for t in range(TOKENS - protected))
    assert counts == [sum(h == head for _, _, h in ranked[: int(free)]) for head in range(HEADS)]


@quick
@given(seed=st.integers(0, 2**32), budget=st.integers(3, 19), taus=st.tuples(*[st.sampled_from([0.5, 1.0, 2.0])] * 2))
def test_cakes_preference_is_its_equation(seed: int, budget: int, taus: tuple[float, float]) -> None:
    views, rankings = random_views(seed, 2)
    cake = Cake(tau_spread=taus[0], tau_shift=taus[1])
    preferences = []
    for view, ranking in zip(views, rankings, strict=True):
        spread = shift = 0.0
        for whole_rows in view.window[0].double().tolist():
            head = [row[: TOKENS - len(whole_rows)] for row in whole_rows]  # what is older than the window
            spread -= sum(a * math.log(a) for row in head for a in row) / len(head) / HEADS
            for column in zip(*head, strict=True):
                mean = sum(column) / len(column)
                shift += sum((a - mean) ** 2 for a in column) / len(column) / HEADS
        preferences.append(spread ** (1 / taus[0]) * shift ** (1 / taus[1]))
        assert float(cake.tell(view, ranking)) == pytest.approx(preferences[-1], rel=1e-9)
    shares = divided(cake, views, rankings, room_of(budget, 2))
    assert sum(shares) == LAYERS * budget
    by_preference = sorted(range(LAYERS), key=lambda layer: preferences[layer])
    assert [shares[layer] for layer in by_preference] == sorted(shares)


@quick
@given(seed=st.integers(0, 2**32), share=st.sampled_from([0.01, 0.2, 0.9]), last=st.integers(-1, TOKENS - 1))
def test_density_is_counted_in_the_rows_after_the_picture(seed: int, share: float, last: int) -> None:
    views, rankings = random_views(seed, 2)
    for view, ranking in zip(views, rankings, strict=True):
        if last >= 0:
            view.kind[:, :, last] = Kind.IMAGE
        counted = [
            sum(a >= share * max(row) and a > 0 for a in row) / (TOKENS - 4 + query + 1)
            for head in view.window[0].tolist()
            for query, row in enumerate(head)
            if TOKENS - 4 + query > last
        ]
        density = sum(counted) / max(1, len(counted))
        assert float(VLCache(share=share).tell(view, ranking)) == pytest.approx(density, rel=1e-6)
    shares = divided(VLCache(share=share), views, rankings, room_of(8, 2))
    assert sum(shares) == LAYERS * 8


@quick
@given(
    seed=st.integers(0, 2**32),
    num_layers=st.integers(1, 9),
    budget=st.integers(3, 19),
    protected=st.integers(1, 3),
    others=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_the_ends_stay_whole_where_the_others_can_pay_and_denser_layers_hold_more(
    seed: int, num_layers: int, budget: int, protected: int, others: float
) -> None:
    d2o, told = D2O(others_fraction=others), []
    for view in [random_views(seed + layer, protected)[0][0] for layer in range(num_layers)]:
        variances = [statistics.variance(head) for head in view.mass[0].double().tolist()]
        low, high = min(variances), max(variances)
        told.append(sum((v - low) / (high - low + 1e-6) for v in variances) / HEADS)
        assert float(d2o.tell(view, view.mass)) == pytest.approx(told[-1], abs=1e-9)
    told = [fraction + layer / 7 % 1 for layer, fraction in enumerate(told)]  # of two heads it is about a half
    room = Room(num_layers=num_layers, num_heads=HEADS, budget=budget, tokens=TOKENS, protected=protected)
    shares = list(layer_entries(d2o, (), room, [torch.tensor([fraction]).double() for fraction in told]))
    assert sum(shares) == num_layers * budget
    ends, inner = {0, min(1, num_layers - 1), num_layers - 1}, range(2, num_layers - 1)
    if inner:
        left = max(protected, int(others * budget)) * len(inner)
        assert {shares[layer] for layer in ends} == {min(TOKENS, (num_layers * budget - left) // 3)}
        assert sum(shares[layer] for layer in inner) >= left
    divided = sorted(inner or ends, key=lambda layer: told[layer])
    falling = sorted((shares[layer] for layer in divided), reverse=True)
    assert [shares[layer] for layer in divided] == pytest.approx(falling, abs=1)


@quick
@given(seed=st.integers(0, 2**32), threshold=st.sampled_from([0.0, 0.1, 0.3, 1.0]))
def test_lazy_layers_keep_what_is_protected_and_the_others_all(seed: int, threshold: float) -> None:
    views, rankings = random_views(seed, 3)
    shares = divided(LazyLayers(threshold=threshold), views, rankings, room_of(8, 3))
    for view, share in zip(views, shares, strict=True):
        looks = sum(sum(head[-3:]) for head in view.probs[0].double().tolist()) / HEADS
        assert share == (3 if looks > threshold else TOKENS)


@pytest.mark.parametrize("path", PARTS, ids=lambda path: path.stem)
def test_a_division_keeps_its_word_on_a_model_alone_and_in_a_padded_batch(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocation, model, steps = allocation_of(path), tiny_model("llama_gqa"), 4
    policies: tuple[Any, ...] = (
        H2O(recent_fraction=0.0, num_recent=2, allocation=allocation),
        SnapKV(num_recent=4, allocation=allocation),
    )
    if allocation is not None and Needs.ARTEFACT in allocation.needs:
        policies = (in_process(monkeypatch, DuoAttention(num_sinks=1, num_recent=2, allocation=allocation)),)
    rows, more = [random_tokens(4, 34), random_tokens(5, 25), random_tokens(6, 9)], random_tokens(7, steps)
    tokens, mask = torch.zeros(3, 38, dtype=torch.int64), torch.ones(3, 38, dtype=torch.int64)
    for index, row in enumerate(rows):
        mask[index, : 34 - len(row)] = 0
        tokens[index] = torch.cat((torch.zeros(34 - len(row), dtype=torch.int64), row, more))
    for policy in policies:
        budget = Budget(tokens=12)
        together = drive(model, PolicyCache(model, policy, budget), tokens, 34, mask)
        for index, row in enumerate(rows):
            alone = drive(model, PolicyCache(model, policy, budget), torch.cat((row, more))[None], len(row))
            for one, other in zip(together.held, alone.held, strict=True):
                assert [layer[index] for layer in one] == [layer[0] for layer in other]
            sizes = [len(head) for layer in alone.held[0] for head in layer[0]]
            uniform = len(sizes) * min(12, len(row))
            total = "exact" if allocation is None else allocation.total
            assert total == "data_dependent" or sum(sizes) == uniform or (total == "bounded" and sum(sizes) < uniform)
            first = [set(head) for layer in alone.held[0] for head in layer[0]]
            newest = set(range(max(0, len(row) - policy.num_recent), len(row)))
            assert all(newest <= head for head in first)


def test_a_layer_is_lazy_or_whole_and_both_are_counted() -> None:
    model, tokens = tiny_model("llama_gqa"), random_tokens(4, 1, 60)
    sizes = set()
    for threshold in (0.0, 0.2, 0.4, 0.6, 1.0):
        policy = StreamingLLM(num_sinks=2, num_recent=10, allocation=LazyLayers(threshold=threshold))
        cache = PolicyCache(model, policy, Budget(tokens=12), positions="original")
        held = drive(model, cache, tokens, 60).held[0]
        counts = [len(layer[0][0]) for layer in held]
        assert set(counts) <= {12, 60}
        assert cache.occupancy().entries_mean == sum(counts) / 2
        sizes.add(sum(counts))
    assert {24, 120} <= sizes


def test_a_statistic_that_only_a_part_needs_is_computed_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Needs] = []
    settle = PolicyLayer.settle_chunk

    def noting(layer: PolicyLayer, *arguments: Any) -> None:
        seen.append(layer._needs)
        settle(layer, *arguments)

    monkeypatch.setattr(PolicyLayer, "settle_chunk", noting)
    model = tiny_model("llama_gqa")
    drive(model, PolicyCache(model, StreamingLLM(allocation=Prefix()), Budget(tokens=9)), random_tokens(1, 1, 30), 30)
    drive(model, PolicyCache(model, StreamingLLM(), Budget(tokens=9)), random_tokens(1, 1, 30), 30)
    assert seen == [Needs.MASS, Needs.MASS, Needs.NOTHING, Needs.NOTHING]


@pytest.mark.parametrize(
    ("kind", "setting"),
    [
        (Cake, {"tau_spread": 0.0}),
        (D2O, {"others_fraction": 1.5}),
        (LazyLayers, {"threshold": 1.5}),
        (VLCache, {"share": 0.0}),
    ],
)
def test_settings_that_are_out_of_range_are_refused(kind: Any, setting: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"policy\.allocation\."):
        kind(**setting)


@settings(max_examples=share_of(60), deadline=None, derandomize=True)
@given(
    path=st.sampled_from([one for one in PARTS if one.stem != "retrieval_heads"]),  # which needs an artefact
    budget=st.one_of(
        st.builds(Budget, tokens=st.integers(5, 30)),
        st.builds(Budget, fraction=st.sampled_from([0.2, 0.5, 0.8]), of=st.sampled_from(["seen", "prompt"])),
    ),
    prompt=st.integers(8, 40),
    turns=st.lists(st.sampled_from([1, 1, 1, 1, 6]), max_size=8),
    every=st.sampled_from([1, 3]),
    merging=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_parts_together_never_hold_more_than_the_uniform_total(
    path: Path, budget: Budget, prompt: int, turns: list[int], every: int, merging: bool, seed: int
) -> None:
    allocation, model = allocation_of(path), tiny_model("llama_gqa")
    every = 1 if isinstance(allocation, LazyLayers) else every  # which reads the newest row
    policy = H2O(
        num_sinks=1,
        num_recent=2,
        recent_fraction=0.0,
        allocation=allocation,
        merge=NearestCosine() if merging else None,
        every_tokens=every,
    )
    cache, seen = PolicyCache(model, policy, budget), 0
    for number, length in enumerate([prompt, *turns]):
        trace = drive(model, cache, random_tokens(seed + number, 1, length), length)
        seen += length
        allowed = budget.entries(seen_tokens=seen, prompt_tokens=prompt)
        heads = [head for layer in trace.held[-1] for head in layer[0]]
        spare = every - 1 if length == 1 else 0
        if allocation is None or allocation.total != "data_dependent":
            assert sum(len(head) for head in heads) <= len(heads) * (allowed + spare)
        for head in heads:
            assert len(set(head)) == len(head)
            assert {*range(min(1, allowed - 1)), *range(max(0, seen - min(2, allowed - 1)), seen)} <= set(head)
