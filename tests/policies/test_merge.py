"""The merges against plain loops over entries, on random keys and values."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvbench.cache import Budget, Merge, Needs, PolicyCache, ScorePolicy, View
from kvbench.cache.slots import Entries, settle
from kvbench.contract.driving import drive
from kvbench.errors import ConfigError
from kvbench.kernels.dispatch import kernels_forced
from kvbench.policies.elastic import Elastic
from kvbench.policies.merge.cam import CaM
from kvbench.policies.merge.d2o import D2O
from kvbench.policies.merge.kvmerger import KVMerger
from kvbench.policies.merge.nearest_cosine import NearestCosine
from kvbench.policies.merge.voronoi import Voronoi
from tests.covering import share_of
from tests.naive import Entry, Head
from tests.naive_merges import Merged, naive_cam, naive_d2o, naive_draw, naive_kvmerger
from tests.naive_rules import buckets
from tests.tiny_models import random_tokens, tiny_model

How = Literal["average", "pivot", "weighted"]
quick = settings(max_examples=share_of(100), deadline=None, derandomize=True)
ROWS, HEADS, WIDTH = 2, 2, 4


def view_of(entries: Entries, **given: Any) -> View:
    rows = torch.full((ROWS,), entries.position.shape[-1])
    return View(
        layer=0,
        num_layers=1,
        new_tokens=1,
        prefill=True,
        prompt=rows,
        seen=rows,
        budget=rows,
        prompt_budget=rows,
        row_seed=rows,
        keys=entries.keys,
        values=entries.values,
        position=entries.position,
        kind=entries.kind,
        mass_or_none=entries.mass,
        **given,
    )


def random_case(seed: int, length: int) -> tuple[Entries, Tensor, Tensor]:
    """Entries in shuffled order, what of them is kept, and what of that is protected."""
    torch.manual_seed(seed)
    position = torch.stack([torch.randperm(2 * length)[:length] for _ in range(ROWS * HEADS)])
    position = position.view(ROWS, HEADS, length).masked_fill_(torch.rand(ROWS, HEADS, length) < 0.2, -1)
    position[..., 0] = 3 * length
    entries = Entries(
        keys=torch.randn(ROWS, HEADS, length, WIDTH),
        values=torch.randn(ROWS, HEADS, length, WIDTH),
        position=position,
        kind=torch.zeros(position.shape, dtype=torch.int8),
        mass=torch.rand(position.shape),
    )
    keep = (torch.rand(position.shape) < 0.5) & (position >= 0)
    keep[..., 0] = True
    return entries, keep, keep & (torch.rand(position.shape) < 0.3)


def naive_cosine(
    entries: Entries, keep: Tensor, protected: Tensor, row: int, head: int, merge: NearestCosine
) -> dict[int, tuple[Tensor, Tensor, float]]:
    """Position -> key, value and mass of each survivor of one head."""
    keys, values = entries.keys[row, head].double(), entries.values[row, head].double()
    assert entries.mass is not None
    mass, held = entries.mass[row, head].double(), range(keys.shape[0])
    joined: dict[int, list[tuple[float, int]]] = {i: [] for i in held if keep[row, head, i]}
    targets = [i for i in joined if merge.protected_too or not protected[row, head, i]]
    for e in held:
        if entries.position[row, head, e] >= 0 and e not in joined and targets:
            cosines = [float(keys[e] @ keys[c] / keys[e].norm() / keys[c].norm()) for c in targets]
            if max(cosines) >= merge.threshold:
                joined[targets[cosines.index(max(cosines))]].append((max(cosines), e))
    found = {}
    for c, members in joined.items():

        def merged(states: Tensor, c: int = c, members: list[tuple[float, int]] = members) -> Tensor:
            parts = [states[c]]
            for cosine, e in members:
                given = {"average": states[e], "pivot": (states[c] + states[e]) / 2, "weighted": cosine * states[e]}
                parts.append(given[merge.how])
            return torch.stack(parts).mean(dim=0)

        key = keys[c] if merge.values_only else merged(keys)
        total = float(mass[c] + sum(mass[e] for _, e in members))
        found[int(entries.position[row, head, c])] = key, merged(values), total
    return found


@pytest.mark.parametrize(
    ("how", "by_kernels"),
    [
        *((how, False) for how in ("average", "pivot", "weighted")),
        *(pytest.param(how, True, marks=pytest.mark.long) for how in ("average", "weighted")),
        ("pivot", True),
    ],
)
def test_what_goes_joins_the_most_similar_key_as_plain_loops_do(how: How, by_kernels: bool) -> None:
    @settings(max_examples=share_of(12 if by_kernels else 60), deadline=None, derandomize=True)
    @given(
        seed=st.integers(0, 2**32),
        length=st.integers(1, 9),
        threshold=st.sampled_from([-1.0, 0.0, 0.4]),
        values_only=st.booleans(),
        protected_too=st.booleans(),
    )
    def compare(seed: int, length: int, threshold: float, values_only: bool, protected_too: bool) -> None:
        merge = NearestCosine(how=how, threshold=threshold, values_only=values_only, protected_too=protected_too)
        entries, keep, protected = random_case(seed, length)
        plan = merge.into(view_of(entries), keep, protected)
        with kernels_forced(by_kernels):
            slots = settle(entries, plan, length + 2)
        assert slots.entries.mass is not None
        for row in range(ROWS):
            for head in range(HEADS):
                expected = naive_cosine(entries, keep, protected, row, head, merge)
                assert int(slots.length[row, head]) == len(expected)
                for slot, (position, (key, value, mass)) in enumerate(sorted(expected.items())):
                    assert int(slots.entries.position[row, head, slot]) == position
                    for stored, wanted in (
                        (slots.entries.keys[row, head, slot], key),
                        (slots.entries.values[row, head, slot], value),
                    ):
                        torch.testing.assert_close(stored.double(), wanted, rtol=1e-4, atol=1e-5)
                    assert float(slots.entries.mass[row, head, slot]) == pytest.approx(mass, abs=1e-5)

    compare()


def head_of(entries: Entries, probs: Tensor, row: int, head: int) -> Head:
    """The entries of one head in the order of tokens."""
    assert entries.mass is not None
    found = [
        Entry(
            position=position,
            key=entries.keys[row, head, slot].double(),
            value=entries.values[row, head, slot].double(),
            mass=float(entries.mass[row, head, slot]),
            rows=[float(probs[row, head, slot])],
        )
        for slot, position in enumerate(entries.position[row, head].tolist())
        if position >= 0
    ]
    return sorted(found, key=lambda e: e.position)


def same_as_lists(
    merge: Merge, seed: int, length: int, naive: Callable[[Head, set[int], set[int], int, int], Merged], **given: Any
) -> None:
    """Compare a merge of all heads with `naive`, from a head, what stays, what is protected, its row and number."""
    entries, keep, protected = random_case(seed, length)
    if seed % 2:  # neighbours that are alike
        entries.keys = entries.keys + 2.0
    probs = torch.rand(entries.position.shape) * (entries.position >= 0)
    view = view_of(entries, probs_or_none=probs, **given)
    slots = settle(entries, merge.into(view, keep, protected), length + 2)
    assert slots.entries.mass is not None
    for row in range(ROWS):
        for head in range(HEADS):
            known = entries.position[row, head]
            stays, safe = ({*known[mask[row, head]].tolist()} for mask in (keep, protected))
            expected, margin = naive(head_of(entries, probs, row, head), stays, safe, row, head)
            if margin < 1e-6:  # rounding decides
                continue
            assert slots.entries.position[row, head].tolist()[: len(expected)] == [e.position for e in expected]
            assert int(slots.length[row, head]) == len(expected)
            for slot, e in enumerate(expected):
                torch.testing.assert_close(slots.entries.keys[row, head, slot].double(), e.key, rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(
                    slots.entries.values[row, head, slot].double(), e.value, rtol=1e-4, atol=1e-5
                )
                assert float(slots.entries.mass[row, head, slot]) == pytest.approx(e.mass, abs=1e-5)


@quick
@given(seed=st.integers(0, 2**32), length=st.integers(1, 12), spread=st.sampled_from([1, 3, 32]))
def test_values_are_spread_over_those_after_them_as_plain_loops_do(seed: int, length: int, spread: int) -> None:
    def naive(head: Head, keep: set[int], protected: set[int], row: int, index: int) -> Merged:
        def draw(position: int) -> float:
            return naive_draw(position, seed=5, layer=0, num_layers=1, head=index, num_heads=HEADS, row_seed=length)

        return naive_cam(head, keep, draw, spread)

    same_as_lists(CaM(spread_tokens=spread, prompt_too=True, seed=5), seed, length, naive)


@quick
@given(
    seed=st.integers(0, 2**32),
    length=st.integers(1, 9),
    momentum=st.sampled_from([0.0, 0.5, 1.0]),
    by_cosine=st.booleans(),
    before=st.sampled_from([None, math.nan, -0.2, 0.6]),
)
def test_what_reaches_the_moving_threshold_joins_as_plain_loops_do(
    seed: int, length: int, momentum: float, by_cosine: bool, before: float | None
) -> None:
    def naive(head: Head, keep: set[int], protected: set[int], row: int, index: int) -> Merged:
        kept, _, margin = naive_d2o(head, keep, math.nan if before is None else before, momentum, by_cosine)
        return kept, margin

    memory = None if before is None else torch.full((ROWS, HEADS, 1), before)
    merge = D2O(momentum=momentum, weights="cosine" if by_cosine else "softmax")
    same_as_lists(merge, seed, length, naive, memory_or_none=memory)


@quick
@given(seed=st.integers(0, 2**32), length=st.integers(1, 12), threshold=st.sampled_from([-1.0, 0.0, 0.75]))
def test_runs_of_neighbours_become_one_as_plain_loops_do(seed: int, length: int, threshold: float) -> None:
    def naive(head: Head, keep: set[int], protected: set[int], row: int, index: int) -> Merged:
        return naive_kvmerger(head, keep, protected, threshold)

    same_as_lists(KVMerger(threshold=threshold), seed, length, naive)


def test_a_released_prompt_gives_nothing_and_a_seed_gives_other_draws() -> None:
    entries, keep, protected = random_case(1, 30)
    view = view_of(entries, probs_or_none=torch.rand(entries.position.shape))
    assert CaM().into(view, keep, protected).values is None
    values = [CaM(prompt_too=True, seed=seed).into(view, keep, protected).values for seed in (0, 1, 0)]
    assert torch.equal(values[0], values[2])  # type: ignore[arg-type]
    assert not torch.equal(values[0], values[1])  # type: ignore[arg-type]


@quick
@given(seed=st.integers(0, 2**32), length=st.integers(1, 9))
def test_what_goes_joins_the_nearest_by_age_as_in_elastics_equation(seed: int, length: int) -> None:
    entries, keep, protected = random_case(seed, length)
    plan = Voronoi().into(view_of(entries), keep, protected)
    assert plan.merge_into is not None
    for row in range(ROWS):
        for head in range(HEADS):
            order = entries.position[row, head].argsort().tolist()
            line = [i for i in order if entries.position[row, head, i] >= 0]
            anchors = [k for k, i in enumerate(line) if keep[row, head, i] and not protected[row, head, i]]
            for anchor, bucket in zip(anchors, buckets(anchors, len(line)), strict=True):
                for k in bucket:
                    joins = line[anchor] if not protected[row, head, line[k]] else line[k]
                    assert plan.merge_into[row, head, line[k]] == joins


@pytest.mark.parametrize(
    "merge",
    [Voronoi(), KVMerger(), D2O(), D2O(weights="cosine"), *(NearestCosine(how=how) for how in get_args(How))],
    ids=str,
)
def test_merging_copies_leaves_them_as_they_are_and_attention_that_counts_them_too(merge: Merge) -> None:
    """Of each two neighbours that are alike the newer goes. A merged entry counts once, so its logit wants log 2."""
    torch.manual_seed(7)
    pairs = 6
    keys = 3 * torch.rand(pairs).diag().repeat_interleave(2, dim=0).expand(ROWS, HEADS, -1, -1)
    values = torch.randn(ROWS, HEADS, pairs, pairs).repeat_interleave(2, dim=2)
    position = torch.arange(2 * pairs).expand(ROWS, HEADS, -1)
    kind, mass = torch.zeros(position.shape, dtype=torch.int8), torch.rand(position.shape)
    entries = Entries(keys=keys, values=values, position=position, kind=kind, mass=mass)
    keep = position % 2 == 0
    merged = settle(entries, merge.into(view_of(entries), keep, torch.zeros_like(keep)), pairs).entries
    torch.testing.assert_close(merged.keys, keys[:, :, ::2])
    torch.testing.assert_close(merged.values, values[:, :, ::2])
    query = torch.randn(ROWS, HEADS, 3, pairs)
    counted = (query @ merged.keys.mT + math.log(2)).softmax(dim=-1) @ merged.values
    torch.testing.assert_close(counted, (query @ keys.mT).softmax(dim=-1) @ values)


@dataclass(frozen=True, kw_only=True)
class LayerMass(ScorePolicy):
    """Elastic's importance: the mean over the heads of a layer."""

    needs: ClassVar[Needs] = Needs.MASS

    def score(self, view: View) -> Tensor:
        return view.mass.mean(dim=1, keepdim=True)


def test_elastics_prompt_is_a_score_and_this_part() -> None:
    model, tokens, budget = tiny_model("llama_gqa"), random_tokens(3, 1, 30), Budget(tokens=9)
    parts = LayerMass(num_sinks=1, num_recent=1, merge=Voronoi())
    caches = [drive(model, PolicyCache(model, policy, budget), tokens, 30).cache for policy in (Elastic(), parts)]
    for whole, composed in zip(*(cache.policy_layers for cache in caches), strict=True):
        assert whole.slots is not None
        assert composed.slots is not None
        for one, other in zip(whole.slots.entries.tensors(), composed.slots.entries.tensors(), strict=True):
            filled = torch.arange(one.shape[2]) < 9
            assert torch.equal(one[:, :, filled], other[:, :, filled])


@pytest.mark.parametrize(
    ("kind", "setting"),
    [
        (NearestCosine, {"how": "mean"}),
        (NearestCosine, {"threshold": 1.5}),
        (CaM, {"spread_tokens": 0}),
        (D2O, {"momentum": 1.5}),
        (D2O, {"weights": "plain"}),
        (KVMerger, {"threshold": -2.0}),
    ],
)
def test_settings_that_are_not_there_are_refused(kind: Any, setting: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"policy\.merge\."):
        kind(**setting)
