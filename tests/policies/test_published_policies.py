"""The bundled policies on models: eviction sequences and stored states of the naive references, layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kvbench.cache import Budget, Policy, PolicyCache, When
from kvbench.cache.layer import PolicyLayer
from kvbench.contract.driving import drive
from kvbench.errors import ConfigError
from kvbench.policies.elastic import Elastic
from kvbench.policies.h2o import H2O
from kvbench.policies.h2o_mean import H2OMean
from kvbench.policies.merge.cam import CaM
from kvbench.policies.merge.d2o import D2O
from kvbench.policies.merge.kvmerger import KVMerger
from kvbench.policies.random import Random
from kvbench.policies.scissorhands import Scissorhands
from kvbench.policies.streaming_llm import StreamingLLM
from kvbench.policies.tova import TOVA
from kvbench.policies.vatp import VATP
from tests import naive_scores
from tests.naive import Entry, NaiveLayer, Rule
from tests.naive_merges import NaiveCaM, NaiveD2O, NaiveKVMerger
from tests.naive_rules import NaiveElastic, NaiveH2O, NaiveRandom, NaiveStreaming
from tests.naive_scores import NaiveScored
from tests.tiny_models import random_tokens, tiny_model

PROMPT, STEPS = 40, 60
RULES: dict[str, tuple[Policy, Callable[[], Rule]]] = {
    "streaming_llm": (StreamingLLM(), NaiveStreaming),
    "h2o": (H2O(), NaiveH2O),
    "random": (Random(seed=3), lambda: NaiveRandom(seed=3)),
    "elastic": (Elastic(), NaiveElastic),
    "elastic_middle": (Elastic(fixed_point=8), lambda: NaiveElastic(fixed_point=8)),
    "vatp": (VATP(), lambda: NaiveScored(naive_scores.vatp, num_sinks=20, recent_fraction=0.5)),
    "tova": (TOVA(), lambda: NaiveScored(naive_scores.tova)),
    "h2o_mean": (H2OMean(), lambda: NaiveScored(naive_scores.h2o_mean)),
    "scissorhands": (Scissorhands(), lambda: NaiveScored(naive_scores.scissorhands(400), num_recent=10)),
    "elastic_values": (Elastic(merge="values"), lambda: NaiveElastic(merge="values")),
    "elastic_keys": (Elastic(merge="keys"), lambda: NaiveElastic(merge="keys")),
    "cam": (StreamingLLM(merge=CaM(seed=2)), lambda: NaiveCaM(NaiveStreaming(), at_steps=True, seed=2)),
    "cam_h2o": (
        H2O(merge=CaM(spread_tokens=3, prompt_too=True)),
        lambda: NaiveCaM(NaiveH2O(), at_steps=True, spread=3, prompt_too=True),
    ),
    "d2o": (H2O(merge=D2O()), lambda: NaiveD2O(NaiveH2O(), at_steps=True)),
    "d2o_cosine": (
        H2O(merge=D2O(momentum=0.3, weights="cosine")),
        lambda: NaiveD2O(NaiveH2O(), at_steps=True, momentum=0.3, by_cosine=True),
    ),
    "kvmerger": (H2O(merge=KVMerger(threshold=0.2)), lambda: NaiveKVMerger(NaiveH2O(), at_steps=False, threshold=0.2)),
    "elastic_recent": (
        Elastic(merge="none", recent_fraction=0.5, fixed_point=1000),
        lambda: NaiveElastic(merge="none", recent_fraction=0.5, fixed_point=1000),
    ),
}

VARIANTS = ("cam_h2o", "d2o_cosine")  # in `make test-all`


@pytest.mark.few(5)
@pytest.mark.cover
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long if name in VARIANTS else ()) for name in RULES]
)
@pytest.mark.parametrize("model_name", ["llama_gqa_8_2", "llama_mha"])
@pytest.mark.parametrize("budget", [Budget(tokens=30), Budget(fraction=0.4), Budget(fraction=0.25, of="prompt")])
def test_the_victims_of_a_long_answer_are_the_papers(
    name: str, model_name: str, budget: Budget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries, keys and values are those the model really made; the naive layer decides from them alone."""
    model, (policy, rule) = tiny_model(model_name, double=True), RULES[name]
    heads = model.config.num_key_value_heads
    decodes = When.DECODE in policy.when
    naive = [
        NaiveLayer(rule=rule(), budget=budget, num_heads=heads, layer=index, num_layers=2, cuts_at_decode=decodes)
        for index in range(2)
    ]
    arrived: dict[int, tuple[Tensor, Tensor]] = {}
    update, attend = PolicyLayer.update, PolicyLayer.attend

    def noting_update(layer: PolicyLayer, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        arrived[layer.setup.layer] = keys.clone(), values.clone()
        return update(layer, keys, values, *args, **kwargs)

    def noting_attend(layer: PolicyLayer, query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        keys, values = arrived[layer.setup.layer]
        expected = naive[layer.setup.layer].forward(query[0], keys[0], values[0])
        output = attend(layer, query, *args, **kwargs)
        torch.testing.assert_close(output[0], expected, rtol=0, atol=1e-5)
        return output

    monkeypatch.setattr(PolicyLayer, "update", noting_update)
    monkeypatch.setattr(PolicyLayer, "attend", noting_attend)
    trace = drive(model, PolicyCache(model, policy, budget), random_tokens(5, 1, PROMPT + STEPS), PROMPT)
    for slow, layer, held in zip(naive, trace.cache.policy_layers, trace.held[-1], strict=True):
        assert slow.rule.margin > 1e-7
        assert held[0] == [tuple(entry.position for entry in head) for head in slow.heads]
        same_states(layer, slow.heads)
    assert sum(len(step) for layer in naive for step in layer.victims) == 2 * heads * (
        PROMPT + STEPS - len(naive[0].heads[0])
    )


def same_states(layer: PolicyLayer, heads: list[list[Entry]]) -> None:
    assert layer.slots is not None
    entries = layer.slots.entries
    for index, head in enumerate(heads):
        order = sorted((p, slot) for slot, p in enumerate(entries.position[0, index].tolist()) if p >= 0)
        slots = [slot for _, slot in order]
        torch.testing.assert_close(entries.keys[0, index, slots], torch.stack([e.key for e in head]), rtol=0, atol=1e-5)
        values = torch.stack([e.value for e in head])
        torch.testing.assert_close(entries.values[0, index, slots], values, rtol=0, atol=1e-5)


def test_elastic_shares_its_entries_among_the_heads_of_a_layer() -> None:
    model = tiny_model("llama_gqa")
    trace = drive(model, PolicyCache(model, Elastic(), Budget(fraction=0.3)), random_tokens(6, 1, 60), 30)
    assert all(layer[0][0] == layer[0][1] for held in trace.held for layer in held)
    assert trace.held[0][0] != trace.held[0][1]


def test_h2o_chooses_per_layer_and_head() -> None:
    model = tiny_model("llama_gqa")
    trace = drive(model, PolicyCache(model, H2O(), Budget(fraction=0.3)), random_tokens(6, 1, 60), 30)
    first, second = trace.held[0]
    assert len({*first[0], *second[0]}) == 4


def test_random_draws_another_subset_per_seed_layer_and_head_but_not_per_row() -> None:
    model, tokens = tiny_model("llama_gqa"), random_tokens(6, 1, 60).expand(2, 60)
    caches = [PolicyCache(model, Random(seed=seed), Budget(fraction=0.3)) for seed in (0, 1)]
    held = [drive(model, cache, tokens, 30).held[-1] for cache in caches]
    assert len({head for trace in held for layer in trace for head in layer[0]}) == 8
    assert all(layer[0] == layer[1] for trace in held for layer in trace)


def test_random_keeps_every_age_equally_often() -> None:
    model, tokens = tiny_model("llama_gqa"), random_tokens(6, 1, 40)
    count = torch.zeros(40)
    for seed in range(60):
        for layer in drive(model, PolicyCache(model, Random(seed=seed), Budget(tokens=10)), tokens, 40).held[0]:
            for head in layer[0]:
                count[list(head)] += 1
    expected = 240 * 10 / 40
    chi_square = float(((count - expected) ** 2 / expected).sum())
    assert chi_square < 72  # 99.9 % quantile of chi-square with 39 degrees of freedom, which keeping 1 in 4 narrows


def test_a_fixed_point_below_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="fixed_point"):
        Elastic(fixed_point=0)
