"""Policies that learn a model offline, against their papers' definitions in plain words on random input."""

from __future__ import annotations

import cmath
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvbench.cache import Calibrated, Room, Sample, View
from kvbench.cache.parts import divided_heads, layer_entries
from kvbench.cache.policy import ranking
from kvbench.cache.positions import Rotation
from kvbench.contract.reference import rotated
from kvbench.errors import ConfigError
from kvbench.policies.allocation.retrieval_heads import RetrievalHeads
from kvbench.policies.duo_attention import DuoAttention
from kvbench.policies.q_filters import QFilters
from kvbench.policies.triattention import TriAttention
from tests.covering import share_of

HEADS, GROUP, WIDTH = 2, 2, 6
FREQUENCIES = torch.tensor([1.0, 0.3, 0.04])
CLOSE = {"rtol": 1e-3, "atol": 1e-4}
seeds = st.integers(0, 2**20)


def sample_of(seed: int, lengths: list[int]) -> tuple[Sample, list[Tensor], list[Tensor]]:
    """A batch padded on the left, and of each text its unrotated queries (Hq, T, D) and keys (H, T, D)."""
    generator, longest = torch.Generator().manual_seed(seed), max(lengths)
    query, keys = (torch.randn(len(lengths), n, longest, WIDTH, generator=generator) for n in (HEADS * GROUP, HEADS))
    query, keys = query + 0.5, keys - 0.2
    position = torch.full((len(lengths), longest), -1)
    texts: tuple[list[Tensor], list[Tensor]] = ([], [])
    for row, length in enumerate(lengths):
        position[row, longest - length :] = torch.arange(length)
        for states, found in zip((query, keys), texts, strict=True):
            found.append(states[row, :, longest - length :].clone())
            turned = [rotated(head, torch.arange(length), FREQUENCIES).float() for head in found[-1]]
            states[row, :, longest - length :] = torch.stack(turned)
    rotation = Rotation(frequencies=FREQUENCIES)
    return Sample(query=query, keys=keys, position=position, rotation=rotation), *texts


def learnt(policy: Calibrated, *samples: Sample) -> dict[str, Tensor]:
    sums: dict[str, Tensor] = {}
    for sample in samples:
        for name, one in policy.gather(sample).items():
            sums[name] = sums.get(name, torch.tensor(0.0)) + one
    return dict(policy.learn(sums))


def view_of(seed: int, seen: int, artefact: dict[str, Tensor], *, budget: int = 3) -> View:
    generator = torch.Generator().manual_seed(seed)
    position = torch.stack([torch.randperm(seen, generator=generator) for _ in range(HEADS)])[None]
    keys = torch.randn(1, HEADS, seen, WIDTH, generator=generator)
    count = torch.tensor([seen])
    return View(
        layer=0, num_layers=1, new_tokens=seen, prefill=True, prompt=count, seen=count, budget=torch.tensor([budget]),
        prompt_budget=torch.tensor([budget]), row_seed=torch.zeros(1, dtype=torch.int64), keys=keys, values=keys,
        position=position, kind=torch.zeros_like(position, dtype=torch.int8), artefact_or_none=artefact,
    )  # fmt: skip


@settings(max_examples=share_of(40), deadline=None)
@given(seed=seeds, lengths=st.lists(st.integers(5, 20), min_size=1, max_size=3))
def test_a_q_filter_is_the_leading_right_singular_vector_of_all_queries_on_their_side(
    seed: int, lengths: list[int]
) -> None:
    sample, _, _ = sample_of(seed, lengths)
    found = learnt(QFilters(), sample)["filter"]
    for head in range(HEADS):
        wanted = []
        for member in range(head * GROUP, (head + 1) * GROUP):
            queries = torch.cat([sample.query[row, member, -length:] for row, length in enumerate(lengths)]).double()
            u, values, v = torch.linalg.svd(queries, full_matrices=False)
            assume(float(values[0] - values[1]) > 1e-2 and abs(float(u[:, 0].sum())) > 1e-2)
            side = 1.0 if float((queries @ v[0]).sum()) > 0 else -1.0
            wanted.append(side * v[0])
        torch.testing.assert_close(found[head].double(), torch.stack(wanted).mean(dim=0), **CLOSE)
    view = view_of(seed, 9, {"filter": found})
    score = QFilters().score(view)
    wanted = sum(float(view.keys[0, 1, 4, d] * found[1, d]) for d in range(WIDTH))
    assert float(score[0, 1, 4]) == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("policy", [QFilters(), DuoAttention(), TriAttention()], ids=lambda one: type(one).__name__)
def test_one_batch_and_several_teach_the_same_and_pads_teach_nothing(policy: Calibrated) -> None:
    whole, _, _ = sample_of(5, [12, 7, 9])
    states = zip(whole.query.split(1), whole.keys.split(1), whole.position.split(1), strict=True)
    parts = [replace(whole, query=query, keys=keys, position=position) for query, keys, position in states]
    ours = learnt(policy, whole)
    for name, one in learnt(policy, *parts).items():
        torch.testing.assert_close(ours[name], one, **CLOSE)
    spoilt = replace(whole, query=torch.where(whole.real[:, None, :, None], whole.query, 9.0))
    for name, one in learnt(policy, spoilt).items():
        torch.testing.assert_close(ours[name], one, **CLOSE)


@settings(max_examples=share_of(12), deadline=None)
@given(seed=seeds, lengths=st.lists(st.integers(3, 12), min_size=1, max_size=2))
def test_a_head_retrieves_as_much_as_its_mean_query_looks_far_back(seed: int, lengths: list[int]) -> None:
    sample, queries, keys = sample_of(seed, lengths)
    found = learnt(DuoAttention(), sample)["score"]
    for head in range(HEADS):
        areas = []
        for text_queries, text_keys in zip(queries, keys, strict=True):
            key = text_keys[head].double().mean(dim=0)
            placed = rotated(key.expand(500, -1), torch.arange(500), FREQUENCIES).double()
            for member in range(head * GROUP, (head + 1) * GROUP):
                query = rotated(
                    text_queries[member].double().mean(dim=0)[None], torch.tensor([499]), FREQUENCIES
                ).double()
                shares = (placed @ query[0] / WIDTH**0.5).softmax(dim=0).tolist()
                so_far = [sum(shares[: place + 1]) for place in range(500)]
                areas.append(sum(so_far) / 500)
        assert float(found[head]) == pytest.approx(sum(areas) / len(areas), abs=1e-4)


@settings(max_examples=share_of(60), deadline=None)
@given(seed=seeds, tokens=st.integers(8, 40), share=st.floats(0.1, 0.95), protected=st.integers(1, 6))
def test_retrieval_heads_are_the_best_of_the_model_and_the_total_is_never_exceeded(
    seed: int, tokens: int, share: float, protected: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(3, HEADS, generator=generator)
    budget = max(1, math.floor(share * tokens))
    protected = min(protected, budget)
    artefact = [{"score": one} for one in scores]
    room = Room(num_layers=3, num_heads=HEADS, budget=budget, tokens=tokens, protected=protected, artefact=artefact)
    given_entries = layer_entries(RetrievalHeads(), (), room)
    assert sum(given_entries) <= 3 * budget
    policy = DuoAttention(num_sinks=1, num_recent=protected - 1, allocation=RetrievalHeads())
    whole = []
    for layer, entries in enumerate(given_entries):
        view = view_of(seed, tokens, artefact[layer], budget=entries)
        held = divided_heads(RetrievalHeads(), view, ranking(policy, view))[0]
        assert int(held.sum()) <= entries * HEADS
        for head in range(HEADS):
            assert int(held[head]) in (protected, tokens)
            if int(held[head]) == tokens and tokens > protected:
                whole.append(float(scores[layer, head]))
    if tokens > protected + HEADS:  # rounding up pays for no further head
        assert sorted(whole, reverse=True) == sorted(scores.flatten().tolist(), reverse=True)[: len(whole)]
        left = 3 * HEADS * budget - (len(whole) * tokens + (3 * HEADS - len(whole)) * protected)
        assert len(whole) == 3 * HEADS or left < tokens - protected + 3 * HEADS


def test_retrieval_heads_need_a_policy_that_has_learnt_them() -> None:
    room = Room(num_layers=2, num_heads=2, budget=5, tokens=10, protected=1)
    with pytest.raises(ConfigError, match="policy=duo_attention"):
        RetrievalHeads().layers(room, ())


@settings(max_examples=share_of(30), deadline=None)
@given(seed=seeds, seen=st.integers(4, 14))
def test_triattention_expects_the_queries_to_come_at_their_distances(seed: int, seen: int) -> None:
    sample, queries, _ = sample_of(seed, [11, 6])
    artefact = learnt(TriAttention(), sample)
    torch.testing.assert_close(artefact["frequencies"], FREQUENCIES)
    view = view_of(seed, seen, artefact)
    found = TriAttention().score(view)
    half = WIDTH // 2
    for head in range(HEADS):
        standardised = []
        for member in range(head * GROUP, (head + 1) * GROUP):
            states: list[Any] = [row for text in queries for row in text[member].double().tolist()]
            pairs = [[complex(row[f], row[half + f]) for f in range(half)] for row in states]
            mean = [sum(pair[f] for pair in pairs) / len(pairs) for f in range(half)]
            length = [sum(abs(pair[f]) for pair in pairs) / len(pairs) for f in range(half)]
            scores = []
            for slot in range(seen):
                at = int(view.position[0, head, slot])
                stored = view.keys[0, head, slot].tolist()
                key = [
                    complex(stored[f], stored[half + f]) * cmath.exp(-1j * float(FREQUENCIES[f]) * at)
                    for f in range(half)
                ]
                expected = 0.0
                for ahead in (2**power for power in range(17)):
                    for f in range(half):
                        angle = cmath.phase(mean[f]) - cmath.phase(key[f])
                        turned = float(FREQUENCIES[f]) * (seen - 1 - at + ahead) + angle
                        expected += abs(mean[f]) * abs(key[f]) * math.cos(turned) / 17
                expected += sum((length[f] - abs(mean[f])) * abs(key[f]) for f in range(half))
                scores.append(expected)
            centre = sum(scores) / seen
            deviation = math.sqrt(sum((one - centre) ** 2 for one in scores) / seen)
            standardised.append([(one - centre) / deviation for one in scores])
        wanted = [max(of_member) for of_member in zip(*standardised, strict=True)]
        assert found[0, head].tolist() == pytest.approx(wanted, abs=2e-2)
