"""Entries that stay whatever the policy says: within the budget, in the place of the lowest, and nothing else moves."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbench.cache import Budget, Policy, PolicyCache, ScorePolicy, cache_argument
from kvbench.cache.policy import Pin, chosen_by, pinned
from kvbench.contract.driving import Trace, drive, left_padded
from kvbench.errors import ConfigError
from kvbench.kernels.dispatch import interpreted, kernels_forced
from kvbench.policies.allocation.ada import Ada
from kvbench.policies.elastic import Elastic
from kvbench.policies.full import Full
from kvbench.policies.h2o import H2O
from kvbench.policies.merge.cam import CaM
from kvbench.policies.merge.voronoi import Voronoi
from kvbench.policies.prefixkv import PrefixKV
from kvbench.policies.snapkv import SnapKV
from kvbench.policies.streaming_llm import StreamingLLM
from tests.covering import share_of
from tests.tiny_models import random_tokens, tiny_model

LENGTHS, STEPS, LAYERS, HEADS = (13, 21), 7, 2, 2
PROMPT = max(LENGTHS)
POLICIES: dict[str, ScorePolicy] = {
    "h2o": H2O(),
    "snapkv": SnapKV(num_recent=3),
    "streaming_llm": StreamingLLM(),
    "ragged": SnapKV(num_recent=3, allocation=Ada()),
    "merging": H2O(merge=Voronoi()),
    "merging_at_decode": H2O(merge=CaM()),
    "in_blocks": H2O(every_tokens=3),
    "spans": H2O(protect="text"),
}


def trace_of(policy: Policy, budget: int) -> Trace:
    tokens, mask = left_padded([random_tokens(row, length) for row, length in enumerate(LENGTHS)])
    steps = random_tokens(9, len(LENGTHS), STEPS)
    whole = torch.cat((tokens, steps), dim=1), torch.cat((mask, torch.ones_like(steps)), dim=1)
    cache = PolicyCache(tiny_model("llama_gqa"), policy, Budget(tokens=budget), prompt_tokens=PROMPT)
    return drive(tiny_model("llama_gqa"), cache, whole[0], PROMPT, whole[1])


@functools.cache
def plain_trace(name: str, budget: int) -> Trace:
    return trace_of(POLICIES[name], budget)


def places(pin: Pin) -> list[tuple[int, int]]:
    layers = range(LAYERS) if pin.layer is None else [pin.layer]
    return [(layer, head) for layer in layers for head in (range(HEADS) if pin.head is None else [pin.head])]


PINS = st.builds(
    Pin,
    position=st.integers(0, min(LENGTHS) - 1),
    layer=st.none() | st.integers(0, LAYERS - 1),
    head=st.none() | st.integers(0, HEADS - 1),
)


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=share_of(16), deadline=None)
@given(pins=st.lists(PINS, min_size=1, max_size=2), budget=st.sampled_from([9, 12]))
def test_what_is_pinned_is_held_from_the_prompt_to_the_end_and_no_head_holds_more_for_it(
    name: str, pins: list[Pin], budget: int
) -> None:
    pins = pins[:1] if name == "ragged" else pins  # one of whose heads may be given room for no more
    plain, kept = plain_trace(name, budget), trace_of(pinned(POLICIES[name], pins), budget)
    for before, held in zip(plain.held, kept.held, strict=True):
        for layer in range(LAYERS):
            for row in range(len(LENGTHS)):
                assert sum(map(len, held[layer][row])) <= sum(map(len, before[layer][row]))
                for head in range(HEADS):
                    wanted = {pin.position for pin in pins if (layer, head) in places(pin)}
                    assert wanted <= set(held[layer][row][head])
                    if "ragged" not in name:  # whose heads divide anew what later layers' scores say
                        assert len(held[layer][row][head]) == len(before[layer][row][head])


@pytest.mark.parametrize("name", POLICIES)
def test_after_the_prompt_one_entry_went_for_one_that_stays_and_the_first_layer_differs_in_no_other(name: str) -> None:
    """The prompt attends in full before it is cut, so what later layers hold after it hangs on no pin of this one."""
    plain = plain_trace(name, 9)
    for head in range(HEADS):
        gone = min(set(range(min(LENGTHS))) - set(plain.held[0][0][0][head]))
        kept = trace_of(pinned(POLICIES[name], [Pin(position=gone, layer=0, head=head)]), 9)
        for layer in range(LAYERS):
            for other in range(HEADS):
                before, now = set(plain.held[0][layer][0][other]), set(kept.held[0][layer][0][other])
                is_it = (layer, other) == (0, head)
                assert now - before == ({gone} if is_it else set())
                assert len(before - now) == int(is_it)


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=share_of(16), deadline=None)
@given(choice=st.integers(0, 10**6), budget=st.sampled_from([5, 9, 12]))
def test_pinning_what_the_policy_keeps_anyway_changes_nothing(name: str, choice: int, budget: int) -> None:
    plain = plain_trace(name, budget)
    kept = [
        (layer, head, p) for layer in range(LAYERS) for head in range(HEADS) for p in plain.held[-1][layer][0][head]
    ]
    layer, head, position = kept[choice % len(kept)]
    if position not in plain.held[-1][layer][1][head]:  # the other row has another entry at that place
        return
    again = trace_of(pinned(POLICIES[name], [Pin(position=position, layer=layer, head=head)]), budget)
    assert again.held == plain.held
    assert all(torch.equal(one, other) for one, other in zip(again.logits, plain.logits, strict=True))


def test_the_entry_of_lowest_score_goes_instead() -> None:
    plain = plain_trace("streaming_llm", 9)
    assert plain.held[0][0][1][0] == (0, 1, 2, 3, 16, 17, 18, 19, 20)
    kept = trace_of(pinned(StreamingLLM(), [Pin(position=7)]), 9)
    assert kept.held[0][0][1][0] == (0, 1, 2, 3, 7, 17, 18, 19, 20)
    assert kept.held[-1][1][1][1] == (0, 1, 2, 3, 7, 24, 25, 26, 27)


def test_sinks_and_recent_tokens_come_first_where_they_take_all() -> None:
    policy = StreamingLLM(num_recent=5)
    assert trace_of(pinned(policy, [Pin(position=7)]), 9).held == trace_of(policy, 9).held


@pytest.mark.long
@pytest.mark.skipif(not interpreted(), reason="on a GPU the engines are compared")
def test_kernels_hold_what_plain_torch_holds() -> None:
    policy = pinned(H2O(), [Pin(position=4), Pin(position=6, layer=1, head=0)])
    traces = []
    for by_kernels in (True, False):
        with kernels_forced(by_kernels):
            traces.append(trace_of(policy, 9).held)
    assert traces[0] == traces[1]
    assert all(4 in head for held in traces[0] for layer in held for row in layer for head in row)


def test_the_class_and_settings_stay_and_what_entries_stay_by_can_be_looked_at(tiny_llama: Any) -> None:
    seen: list[int] = []
    policy = chosen_by(SnapKV(num_recent=3), lambda view, ranked: seen.append(view.layer) or ranked)  # type: ignore[func-returns-value]
    assert isinstance(policy, SnapKV)
    assert (policy.num_recent, policy.when, type(policy).__name__) == (3, SnapKV.when, "SnapKV")
    cache = PolicyCache(tiny_llama, policy, Budget(tokens=5))
    drive(tiny_llama, cache, random_tokens(1, 1, 12), 10)
    assert seen == [0, 1]
    assert cache_argument(tiny_llama, cache)


@pytest.mark.parametrize("policy", [Elastic(), PrefixKV(), Full()], ids=lambda policy: type(policy).__name__)
def test_a_policy_that_chooses_by_itself_is_refused_by_name(policy: Policy) -> None:
    name = type(policy).__name__
    with pytest.raises(ConfigError, match=f"{name} does not choose by a score alone, .* h2o or snapkv"):
        pinned(policy, [Pin(position=1)])
