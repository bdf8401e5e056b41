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

from kvbench.cache import Budget, Calibrated, Layout, PolicyCache, Room, Sample, ScorePolicy, View, cache_argument
from kvbench.cache.parts import divided_heads, layer_entries
from kvbench.cache.policy import ranking
from kvbench.cache.positions import Rotation
from kvbench.cache.recording import CalibrationCache
from kvbench.cache.second_pass import read_again
from kvbench.contract.driving import left_padded
from kvbench.contract.equality import rotated
from kvbench.errors import ConfigError, PolicyError
from kvbench.policies.allocation.retrieval_heads import RetrievalHeads
from kvbench.policies.duo_attention import DuoAttention
from kvbench.policies.fast_kvzip import FastKVzip
from kvbench.policies.kvzap import KVzap
from kvbench.policies.kvzip import KVzip
from kvbench.policies.kvzip_plus import KVzipPlus
from kvbench.policies.q_filters import QFilters
from kvbench.policies.triattention import TriAttention
from tests.covering import share_of
from tests.tiny_models import random_tokens, tiny_model

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


HIDDEN = 5


def told_sample(seed: int, lengths: list[int]) -> Sample:
    """A batch padded on the left, with hidden states and with scores of the tokens when the prompt is repeated."""
    sample, _, _ = sample_of(seed, lengths)
    generator = torch.Generator().manual_seed(seed + 1)
    hidden = torch.randn(*sample.position.shape, HIDDEN, generator=generator)
    scores = torch.rand(len(lengths), HEADS, sample.position.shape[1], generator=generator)
    return replace(sample, hidden_or_none=hidden, repeated_or_none=scores)


def arriving(hidden: Tensor, artefact: dict[str, Tensor]) -> View:
    return replace(view_of(1, hidden.shape[1], artefact), hidden_or_none=hidden)


@settings(max_examples=share_of(30), deadline=None)
@given(seed=seeds, lengths=st.lists(st.integers(6, 20), min_size=1, max_size=3), ridge=st.sampled_from([0.1, 1.0, 7.0]))
def test_kvzap_is_the_ridge_regression_of_log_scores_with_a_free_intercept(
    seed: int, lengths: list[int], ridge: float
) -> None:
    """By the normal equations' own property: at the minimum the loss has no slope, in weights and intercept."""
    policy, sample = KVzap(ridge=ridge), told_sample(seed, lengths)
    found = learnt(policy, sample)
    rows = [(b, t) for b in range(len(lengths)) for t in range(sample.position.shape[1]) if sample.position[b, t] >= 0]
    for head in range(HEADS):
        slope, free = [ridge * float(w) for w in found["weight"][head]], 0.0
        for b, t in rows:
            state = sample.hidden[b, t].tolist()
            told = sum(w * x for w, x in zip(found["weight"][head].tolist(), state, strict=True))
            miss = told + float(found["bias"][head]) - math.log(max(float(sample.repeated[b, head, t]), 1e-12))
            slope, free = [s + miss * x for s, x in zip(slope, state, strict=True)], free + miss
        assert max(map(abs, [*slope, free])) < 1e-2
    hidden = torch.randn(1, 4, HIDDEN, generator=torch.Generator().manual_seed(seed))
    noted = policy.note(arriving(hidden, found))
    told = sum(float(x * w) for x, w in zip(hidden[0, 2], found["weight"][1], strict=True)) + float(found["bias"][1])
    assert float(noted[0, 1, 2]) == pytest.approx(told, abs=1e-4)


@settings(max_examples=share_of(12), deadline=None)
@given(seed=seeds)
def test_a_gate_of_fast_kvzip_weighs_a_token_against_its_sinks(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shapes = FastKVzip().shapes(Layout(num_layers=1, num_heads=HEADS, group=GROUP, width=WIDTH, hidden=HIDDEN))
    gate = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    hidden = torch.randn(1, 3, HIDDEN, generator=generator)
    noted = FastKVzip().note(arriving(hidden, gate))

    def normed(numbers: Tensor, weight: Tensor) -> Tensor:
        return numbers / math.sqrt(float((numbers**2).mean()) + 1e-6) * weight

    for head in range(HEADS):
        for token in range(3):
            state, shares = hidden[0, token], []
            key = normed(gate["key"][head] @ state, gate["key_norm"])
            for member in range(GROUP):
                query = gate["query"][head, member] @ state + gate["query_bias"][head, member]
                query = normed(query, gate["query_norm"])
                own = float(query @ key) / 4 + float(gate["offset"][head, member])
                others = sum(math.exp(float(query @ sink) / 4 - own) for sink in gate["sinks"][head])
                shares.append(1 / (1 + others))
            assert float(noted[0, head, token]) == pytest.approx(sum(shares) / GROUP, rel=1e-3, abs=1e-5)


def test_training_a_gate_is_deterministic_and_comes_nearer_to_what_it_is_told() -> None:
    sample = told_sample(3, [90, 70])
    easy = sample.hidden[..., :1].sigmoid().transpose(1, 2).expand(-1, HEADS, -1)
    sample = replace(sample, repeated_or_none=easy)

    def miss(policy: FastKVzip) -> tuple[dict[str, Tensor], float]:
        found = learnt(policy, sample)
        told = policy.note(arriving(sample.hidden[:1], found))
        return found, float((told - easy[:1])[:, :, sample.real[0]].abs().mean())

    (one, before), (_, after) = miss(FastKVzip(epochs=1)), miss(FastKVzip(epochs=80))
    assert after < 0.8 * before
    again, _ = miss(FastKVzip(epochs=1))
    assert all(torch.equal(one[name], again[name]) for name in one)
    other, _ = miss(FastKVzip(epochs=1, seed=1))
    assert not torch.equal(one["query"], other["query"])


def test_a_text_teaches_a_gate_evenly_spaced_tokens_and_no_pads() -> None:
    sample = told_sample(4, [20, 7])
    found = FastKVzip(tokens_per_text=5).gather(sample)
    assert found["states"].shape == (10, HIDDEN)
    first = [round(float(at)) for at in torch.linspace(0, 19, 5)]
    last = [13 + round(float(at)) for at in torch.linspace(0, 6, 5)]
    torch.testing.assert_close(found["states"], torch.cat((sample.hidden[0, first], sample.hidden[1, last])))
    torch.testing.assert_close(found["scores"][5:], sample.repeated[1][:, last].T)


@pytest.mark.parametrize(("pupil", "teacher"), [(KVzap(), KVzipPlus()), (FastKVzip(), KVzip())])
def test_calibration_tells_what_the_teacher_reads_while_the_prompt_is_repeated(
    pupil: Calibrated, teacher: ScorePolicy
) -> None:
    model, rows = tiny_model("llama_gqa"), [random_tokens(1, 19), random_tokens(2, 11)]
    tokens, mask = left_padded(rows)
    cache, samples = CalibrationCache(model, pupil), []
    noted: Any = pytest.MonkeyPatch()
    noted.setattr(type(pupil), "gather", lambda self, sample: samples.append(sample) or {})
    views: list[View] = []
    noted.setattr(type(teacher), "score", lambda self, view: views.append(view) or view.position.float())
    try:
        for one in (cache, PolicyCache(model, replace(teacher, allocation=None), Budget(tokens=4))):
            place = (mask.cumsum(-1) - 1).clamp(min=0)
            with torch.no_grad():
                model(tokens, attention_mask=mask, position_ids=place, **cache_argument(model, one))
            assert one.awaits_second_pass
            read_again(model, one, tokens, mask)
    finally:
        noted.undo()
    assert not cache.awaits_second_pass
    for sample, view in zip(samples, views, strict=True):
        assert sample.hidden.shape == (2, 19, 32)
        torch.testing.assert_close(sample.repeated, view.repeated, rtol=1e-5, atol=1e-7)


def test_what_was_not_declared_is_not_learnt_from() -> None:
    sample, _, _ = sample_of(1, [9])
    with pytest.raises(PolicyError, match=r"learns from HIDDEN.*add Needs\.HIDDEN"):
        KVzap().gather(sample)
