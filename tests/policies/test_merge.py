"""The merges against plain loops over entries, on random keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvbench.cache import Budget, Needs, PolicyCache, ScorePolicy, View
from kvbench.cache.slots import Entries, settle
from kvbench.errors import ConfigError
from kvbench.kernels.dispatch import kernels_forced
from kvbench.policies.elastic import Elastic
from kvbench.policies.merge.nearest_cosine import NearestCosine
from kvbench.policies.merge.voronoi import Voronoi
from tests.covering import share_of
from tests.driving import drive
from tests.naive_rules import buckets
from tests.tiny_models import random_tokens, tiny_model

How = Literal["average", "pivot", "weighted"]
quick = settings(max_examples=share_of(100), deadline=None, derandomize=True)
ROWS, HEADS, WIDTH = 2, 2, 4


def view_of(entries: Entries) -> View:
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


@pytest.mark.parametrize("setting", [{"how": "mean"}, {"threshold": 1.5}])
def test_settings_that_are_not_there_are_refused(setting: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"policy\.merge\."):
        NearestCosine(**setting)  # type: ignore[arg-type]
