"""Layers on several devices: each has its counts, angles and places beside its weights, copied no more than needed.

"cpu" and "cpu:0" are two names of one device, and "meta" is a device without numbers: enough to see what lies where.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from kvbench.cache import Budget, PolicyCache
from kvbench.cache.counts import CountsShelf, LayerSetup, Ledger
from kvbench.cache.positions import Places, Rotation
from kvbench.contract.driving import drive
from kvbench.policies.h2o import H2O
from tests.tiny_models import random_tokens, tiny_model

CPU, OTHER, META = torch.device("cpu"), torch.device("cpu", 0), torch.device("meta")
POLICY, BUDGET = H2O(), Budget(fraction=0.5)


def ledger() -> Ledger:
    made = Ledger(policy=POLICY, budget=BUDGET)
    made.begin_chunk([8, 6])
    made.settle([4, 3])
    return made


def test_the_first_layer_of_each_device_moves_its_counts() -> None:
    shelf, setup = CountsShelf(), LayerSetup(layer=0, num_layers=4, policy=POLICY, budget=BUDGET, reserve_tokens=4)
    taken = [
        shelf.take(replace(setup, layer=layer), ledger(), device)
        for layer, device in enumerate((CPU, CPU, OTHER, OTHER))
    ]
    assert [leads for _, leads in taken] == [True, False, True, False]
    counts = [counts for counts, _ in taken]
    assert counts[0] is counts[1]
    assert counts[0] is not counts[2] is counts[3]


def test_angles_are_copied_to_a_device_once() -> None:
    rotation = Rotation(frequencies=torch.tensor([1.0, 0.1]))
    assert rotation.on(CPU) is rotation.frequencies
    assert rotation.on(META) is rotation.on(META)
    assert rotation.on(META).device == META
    assert {table.device for table in rotation.tables(5, META)} == {META}


def test_the_place_of_a_pass_is_copied_to_a_device_once_and_made_anew_by_the_next_pass() -> None:
    places = Places(rotation=Rotation(frequencies=torch.tensor([1.0, 0.1])))
    states, length, seen = torch.zeros(2, 2, 1, 4), torch.tensor([[3, 4], [2, 2]]), torch.tensor([9, 5])
    places.arrive(states, 0, length, seen)
    assert places.by is not None
    assert places.by.tolist() == [-5, -3]
    elsewhere = states.to(META)
    assert places.arrive(elsewhere, 1, length.to(META), seen.to(META)).device == META
    first = places._elsewhere[META]
    places.turned(elsewhere)
    assert places._elsewhere[META] is first
    places.arrive(states, 0, length, seen + 1)
    assert META not in places._elsewhere


def test_what_a_cache_holds_is_told_for_each_device(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = tiny_model("llama_gqa"), random_tokens(3, 1, 20)
    cache = PolicyCache(model, POLICY, BUDGET)
    assert cache.devices == []
    drive(model, cache, tokens, 18)
    assert cache.devices == [CPU]
    assert cache.occupancy(CPU) == cache.occupancy()
    with pytest.raises(ValueError, match="the cache is empty"):
        cache.occupancy(META)
    decided: list[int] = []
    for number, layer in enumerate(cache.policy_layers):
        monkeypatch.setattr(layer, "decide", lambda number=number: decided.append(number))
    cache.decide(META)
    assert decided == []
    cache.decide(CPU)
    assert decided == [0, 1]


def test_settling_tells_where_it_happens() -> None:
    from contextlib import nullcontext

    told: list[Any] = []
    cache = PolicyCache(
        tiny_model("llama_gqa"), POLICY, BUDGET, on_settle=lambda device: nullcontext(told.append(device))
    )
    drive(tiny_model("llama_gqa"), cache, random_tokens(3, 1, 9), 9)
    assert told == [CPU, CPU]
