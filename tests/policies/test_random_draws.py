from __future__ import annotations

import torch

from kvbench.cache import Budget, PolicyCache, cache_argument
from tests.covering import YAMLS
from tests.tiny_models import random_tokens, tiny_model


def held(seeds: list[int], tokens: torch.Tensor) -> list[set[int]]:
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    policy = instantiate(OmegaConf.load(next(path for path in YAMLS if path.stem == "random")))
    model = tiny_model("llama_gqa")
    cache = PolicyCache(model, policy, Budget(tokens=10), row_seeds=seeds)
    model(tokens, **cache_argument(model, cache))
    slots = cache.policy_layers[0].slots
    assert slots is not None
    return [set(row[row >= 0].tolist()) for row in slots.entries.position[:, 0]]


def test_sequences_draw_differently_and_each_the_same_alone_and_in_a_batch() -> None:
    tokens = random_tokens(5, 2, 40)
    first, second = held([11, 12], tokens)
    assert first != second
    assert held([11], tokens[:1]) == [first]
    assert held([12], tokens[1:]) == [second]


def test_the_same_number_draws_the_same() -> None:
    first, second = held([7, 7], random_tokens(6, 2, 40))
    assert first == second
