"""positions=released: a new token stands at the number of entries that the first layer held when it came."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from kvbench.cache import Budget, Plan, Policy, PolicyCache, ScorePolicy, View
from kvbench.cache.positions import Places, Rotation
from kvbench.cache.selection import keep_top
from kvbench.contract.driving import drive
from kvbench.contract.equality import rotated, visible_entries, visible_logits
from kvbench.errors import ModelSupportError
from kvbench.policies.released.elastic import ElasticReleased
from kvbench.policies.released.h2o_elastic import H2OElasticRelease
from kvbench.policies.released.local_elastic import LocalElasticRelease
from tests.tiny_models import random_tokens, tiny_model


@dataclass(frozen=True, kw_only=True)
class LessInLaterLayers(ScorePolicy):
    """Three entries fewer in every further layer, so that layers disagree about their length."""

    def score(self, view: View) -> Tensor:
        return view.position.float()

    def plan(self, view: View) -> Plan:
        return Plan(keep=keep_top(self.score(view), view.position, view.budget - 3 * view.layer))


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (ElasticReleased(), [49, 50, 51, 52, 52, 53, 53, 54, 54]),
        (H2OElasticRelease(), [49, 50, 51, 52, 52, 53, 53, 54, 54]),
        (LocalElasticRelease(), [50, 51, 51, 52, 52, 53, 53, 54, 54]),
    ],
    ids=["elastic", "h2o", "local"],
)
def test_after_a_prompt_of_100_tokens_halved_the_places_are_those_seen_on_transformers_4_31(
    policy: Policy, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    places: list[int] = []
    arrive = Places.arrive

    def noting(self: Places, keys: Tensor, layer: int, length: Tensor, seen: Tensor) -> Tensor:
        turned = arrive(self, keys, layer, length, seen)
        assert self.by is not None
        if layer == 0:
            places.append(int(self.by[0]) + int(seen[0]))
        return turned

    monkeypatch.setattr(Places, "arrive", noting)
    model = tiny_model("llama_gqa")
    cache = PolicyCache(model, policy, Budget(fraction=0.5), positions="released")
    drive(model, cache, random_tokens(3, 1, 109), 100)
    assert places == expected


def test_every_layer_goes_by_the_length_of_the_first() -> None:
    model, tokens = tiny_model("llama_gqa", double=True), random_tokens(8, 1, 30)
    cache = PolicyCache(model, LessInLaterLayers(), Budget(tokens=12), positions="released")
    trace = drive(model, cache, tokens, 20)
    assert [len(layer[0][0]) for layer in trace.held[0]] == [12, 9]
    visible = visible_entries([[layer[0] for layer in held] for held in trace.held], 20)
    expected = visible_logits(model, tokens[0], visible, positions="released")
    torch.testing.assert_close(torch.stack(trace.logits)[:, 0], expected[20:], rtol=1e-5, atol=1e-5)


def test_stored_keys_stand_where_their_tokens_stood_when_they_came() -> None:
    """The key of a generated token is that of the full cache, turned back by what was evicted."""
    model, tokens = tiny_model("llama_mha", double=True), random_tokens(9, 1, 26)
    whole = drive(model, PolicyCache(model, LocalElasticRelease()), tokens[:, :21], 20).cache
    cut = PolicyCache(model, LocalElasticRelease(), Budget(fraction=0.5), positions="released")
    drive(model, cut, tokens[:, :21], 20)
    keys, full = (cache.policy_layers[0].slots.entries for cache in (cut, whole))  # type: ignore[union-attr]
    newest = int((keys.position[0, 0] == 20).nonzero())
    frequencies = model.model.rotary_emb.inv_freq
    for head in range(4):
        turned = rotated(full.keys[0, head, 20:21], torch.tensor([10 - 20]), frequencies)
        torch.testing.assert_close(keys.keys[0, head, newest : newest + 1], turned, rtol=1e-6, atol=1e-6)


def test_rows_of_a_batch_are_turned_by_their_own_lengths() -> None:
    places = Places(rotation=Rotation(frequencies=torch.tensor([1.0])))
    keys = torch.tensor([[[[1.0, 0.0]]], [[[1.0, 0.0]]]])
    turned = places.arrive(keys, 0, torch.tensor([[3, 2], [7, 7]]), torch.tensor([5, 7]))
    expected = torch.tensor([[[[torch.cos(torch.tensor(-2.0)), torch.sin(torch.tensor(-2.0))]]], [[[1.0, 0.0]]]])
    torch.testing.assert_close(turned, expected)


def test_without_one_fixed_rotation_it_is_refused_by_its_name() -> None:
    model: Any = tiny_model("llama_gqa")
    kind = model.model.rotary_emb.rope_type
    model.model.rotary_emb.rope_type = "dynamic"
    try:
        with pytest.raises(ModelSupportError, match="positions=released"):
            PolicyCache(model, LocalElasticRelease(), positions="released")
    finally:
        model.model.rotary_emb.rope_type = kind
