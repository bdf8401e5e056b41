"""A layer driven with random queries, keys and values does what the naive layer does, step by step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvbench.cache import Budget, Policy
from kvbench.cache.counts import LayerSetup
from kvbench.cache.layer import PolicyLayer
from kvbench.cache.positions import Rotation
from kvbench.policies.elastic import Elastic
from kvbench.policies.full import Full
from kvbench.policies.h2o import H2O
from kvbench.policies.random import Random
from kvbench.policies.streaming_llm import StreamingLLM
from tests.covering import share_of
from tests.naive import Entry, NaiveLayer, Rule
from tests.naive_rules import NaiveElastic, NaiveFull, NaiveH2O, NaiveRandom, NaiveStreaming

WIDTH = 4
FREQUENCIES = torch.tensor([1.0, 0.1])
PAIRS: dict[str, list[tuple[Policy, Callable[[], Rule]]]] = {
    "full": [(Full(), NaiveFull)],
    "streaming_llm": [
        (StreamingLLM(), NaiveStreaming),
        (StreamingLLM(num_sinks=0), lambda: NaiveStreaming(num_sinks=0)),
        (StreamingLLM(num_sinks=1), lambda: NaiveStreaming(num_sinks=1)),
    ],
    "h2o": [
        (H2O(), NaiveH2O),
        (H2O(recent_fraction=0.0), lambda: NaiveH2O(recent_fraction=0.0)),
        (H2O(recent_fraction=0.29), lambda: NaiveH2O(recent_fraction=0.29)),
    ],
    "random": [(Random(), NaiveRandom), (Random(seed=12345), lambda: NaiveRandom(seed=12345))],
    "elastic": [
        (Elastic(), NaiveElastic),
        (Elastic(fixed_point=1), lambda: NaiveElastic(fixed_point=1)),
        (Elastic(fixed_point=4), lambda: NaiveElastic(fixed_point=4)),
    ],
}
BUDGETS = st.one_of(
    st.builds(Budget, tokens=st.integers(1, 14)),
    st.builds(Budget, fraction=st.sampled_from([0.05, 0.2, 0.29, 0.5, 0.9]), of=st.sampled_from(["seen", "prompt"])),
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """What a drive is made of; `turns` are the lengths of the passes, the first being the prompt."""

    budget: Budget
    heads: int
    group: int
    turns: list[int]
    pads: int
    in_cache: bool
    reserve_tokens: int
    seed: int


CASES = st.builds(
    Case,
    budget=BUDGETS,
    heads=st.integers(1, 2),
    group=st.integers(1, 3),
    turns=st.builds(
        lambda prompt, rest: [prompt, *rest],
        st.integers(1, 20),
        st.lists(st.sampled_from([1, 1, 1, 1, 1, 1, 2, 5]), min_size=4, max_size=16),
    ),
    pads=st.integers(0, 19),
    in_cache=st.booleans(),
    reserve_tokens=st.sampled_from([0, 8]),
    seed=st.integers(0, 2**32),
)


@pytest.mark.few(2)
@pytest.mark.parametrize("name", PAIRS)
def test_a_layer_evicts_attends_and_merges_as_the_naive_layer_does(name: str) -> None:
    @settings(max_examples=share_of(60), deadline=None, derandomize=True)
    @given(case=CASES, pair=st.sampled_from(PAIRS[name]))
    def compare(case: Case, pair: tuple[Policy, Callable[[], Rule]]) -> None:
        compare_drives(case, *pair)

    compare()


def compare_drives(case: Case, policy: Policy, rule: Callable[[], Rule]) -> None:
    torch.manual_seed(case.seed)
    layer = PolicyLayer(
        LayerSetup(
            layer=3,
            num_layers=5,
            policy=policy,
            budget=case.budget,
            rotation=Rotation(frequencies=FREQUENCIES) if case.in_cache else None,
            reserve_tokens=case.reserve_tokens,
            prompt_kind=None,
        )
    )
    pads = [0, min(case.pads, case.turns[0] - 1)]
    rows = [naive(case, policy, rule()) for _ in pads]
    mask = torch.zeros(2, 0, dtype=torch.bool)
    for number, turn in enumerate(case.turns):
        query = 2 * torch.randn(2, case.heads * case.group, turn, WIDTH)
        key, value = 2 * torch.randn(2, case.heads, turn, WIDTH), torch.randn(2, case.heads, turn, WIDTH)
        skip = pads if number == 0 else [0, 0]
        mask = torch.cat((mask, torch.arange(turn)[None] >= torch.tensor(skip)[:, None]), dim=1)
        keys, values = layer.update(key, value)
        output = layer.attend(query, keys, values, WIDTH**-0.5, mask)
        for row, (slow, first) in enumerate(zip(rows, skip, strict=True)):
            expected = slow.forward(query[row, :, first:], key[row, :, first:], value[row, :, first:])
            assume(slow.rule.margin > 1e-5)
            torch.testing.assert_close(output[row, :, first:].double(), expected, rtol=1e-4, atol=1e-4)
            same_entries(layer, row, slow, policy)


def naive(case: Case, policy: Policy, rule: Rule) -> NaiveLayer:
    return NaiveLayer(
        rule=rule,
        budget=case.budget,
        num_heads=case.heads,
        bounded=policy.bounded,
        layer=3,
        num_layers=5,
        frequencies=FREQUENCIES if case.in_cache else None,
    )


def same_entries(layer: PolicyLayer, row: int, slow: NaiveLayer, policy: Policy) -> None:
    assert layer.slots is not None
    entries = layer.slots.entries
    for head, expected in enumerate(slow.heads):
        position = entries.position[row, head]
        held = sorted((p, slot) for slot, p in enumerate(position.tolist()) if p >= 0)
        assert [p for p, _ in held] == [e.position for e in expected]
        assert int(layer.slots.length[row, head]) == len(held)
        slots = [slot for _, slot in held]
        close(entries.keys[row, head, slots], expected, "key")
        close(entries.values[row, head, slots], expected, "value")
        if entries.mass is not None:
            mass = torch.tensor([e.mass for e in expected], dtype=torch.float64)
            torch.testing.assert_close(entries.mass[row, head, slots].double(), mass, rtol=1e-4, atol=1e-5)


def close(stored: Tensor, expected: list[Entry], name: Any) -> None:
    stacked = torch.stack([getattr(entry, name) for entry in expected])
    torch.testing.assert_close(stored.double(), stacked, rtol=1e-4, atol=1e-5)
