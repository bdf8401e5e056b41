"""Layers that cut together wait for the last one and then share the mean."""

from __future__ import annotations

import torch

from kvbench.cache import Budget, PolicyCache
from kvbench.cache.released import Pool
from kvbench.cache.slots import Entries
from kvbench.contract.driving import drive
from kvbench.policies.released.h2o_elastic import H2OElasticRelease
from tests.tiny_models import random_tokens, tiny_model


def entries(*heads: list[float]) -> Entries:
    mass = torch.tensor([heads])
    states = torch.zeros(*mass.shape, 2)
    position = torch.zeros_like(mass, dtype=torch.int64)
    return Entries(keys=states, values=states, position=position, kind=position, mass=mass)


def test_nothing_is_cut_before_the_last_layer_came_and_then_all_have_the_mean() -> None:
    pool, cut = Pool(), []
    first, second = entries([1.0, 2.0], [3.0, 6.0]), entries([5.0, 0.0], [7.0, 4.0])
    pool.arrive(first, 2, lambda: cut.append(1))
    assert cut == []
    pool.arrive(second, 2, lambda: cut.append(2))
    assert cut == [1, 2]
    for layer in (first, second):
        assert layer.mass is not None
        assert layer.mass.tolist() == [[[4.0, 3.0], [4.0, 3.0]]]
    assert pool.waiting == []


def test_a_pass_that_did_not_end_is_forgotten_by_a_reset() -> None:
    model, tokens = tiny_model("llama_gqa"), random_tokens(3, 1, 30)
    cache = PolicyCache(model, H2OElasticRelease(), Budget(fraction=0.5))
    pool = cache.policy_layers[0].setup.pool
    assert pool is not None
    pool.waiting.append((entries([1.0]), lambda: None))
    cache.reset()
    again = drive(model, cache, tokens, 20).held
    assert again == drive(model, PolicyCache(model, H2OElasticRelease(), Budget(fraction=0.5)), tokens, 20).held
