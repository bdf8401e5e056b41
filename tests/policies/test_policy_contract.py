"""The contract that every yaml in conf/policy is held to; a new yaml is tested with no registration."""

from __future__ import annotations

import dataclasses
import gc
import math
import weakref
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from kvbench.cache import UNLIMITED, Budget, Needs, Policy, PolicyCache, ScorePolicy, When
from kvbench.cache.layer import PolicyLayer
from kvbench.cache.policy import needs_of
from tests.contract import BUDGETS, CLOSE, PROMPT, STEPS, allowed, block, budget_named, cells, is_divided, is_outcome
from tests.driving import drive, storage_bytes, tensors_of
from tests.tiny_models import random_tokens, tiny_model


def test_every_policy_yaml_builds_a_frozen_policy(policy: Policy) -> None:
    assert isinstance(policy, Policy)
    assert dataclasses.is_dataclass(policy)
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.smallest_budget_tokens_ = 3  # type: ignore[attr-defined]
    assert hash(policy) == hash(dataclasses.replace(policy))


@pytest.mark.parametrize("budget_name", BUDGETS)
def test_no_layer_or_head_ever_holds_more_than_the_budget(policy: Policy, positions: Any, budget_name: str) -> None:
    model, budget = tiny_model("llama_gqa"), budget_named(budget_name, policy)
    cache = PolicyCache(model, policy, budget, positions=positions)
    trace = drive(model, cache, random_tokens(4, 1, PROMPT + STEPS), PROMPT)
    assert all(bool(torch.isfinite(step).all()) for step in trace.logits)
    kept_of_prompt = cells(trace.held[0])
    for step, held in enumerate(trace.held):
        most = [
            allowed(policy, budget, PROMPT, PROMPT + step, len(kept)) + block(policy, step) for kept in kept_of_prompt
        ]
        assert all(cells(held))
        assert sum(len(head) for head in cells(held)) <= sum(most)
        assert is_divided(policy) or all(len(head) <= one for head, one in zip(cells(held), most, strict=True))


@pytest.mark.parametrize("budget_name", BUDGETS)
def test_a_score_policy_uses_its_whole_budget(policy: Policy, budget_name: str) -> None:
    if not isinstance(policy, ScorePolicy) or is_outcome(policy):
        pytest.skip("may keep less")
    model, budget = tiny_model("llama_gqa"), budget_named(budget_name, policy)
    trace = drive(model, PolicyCache(model, policy, budget), random_tokens(4, 1, PROMPT + STEPS), PROMPT)
    before = PROMPT
    for step, held in enumerate(trace.held):
        most = allowed(policy, budget, PROMPT, PROMPT + step, before)
        before = before + 1 if step and before + 1 - most <= block(policy, step) else min(before + (step > 0), most)
        assert is_divided(policy) or {len(head) for head in cells(held)} == {before}
        sizes, exact = sum(len(head) for head in cells(held)), not is_divided(policy) or policy.allocation is None
        exact = exact or (policy.allocation is not None and policy.allocation.total == "exact")
        assert sizes == before * len(cells(held)) if exact else sizes <= before * len(cells(held))


@pytest.mark.parametrize("prompt", [1, 8, 9, 10, 36])
def test_prompts_may_be_shorter_or_longer_than_the_budget(policy: Policy, positions: Any, prompt: int) -> None:
    model, budget, tokens = tiny_model("llama_mha"), Budget(tokens=9), random_tokens(4, 1, prompt + STEPS)
    trace = drive(model, PolicyCache(model, policy, budget, positions=positions), tokens, prompt)
    whole = drive(model, PolicyCache(model, policy, UNLIMITED, positions=positions), tokens, prompt)
    for step, held in enumerate(trace.held):
        kept = [len(head) for head in cells(trace.held[0])]
        most = allowed(policy, budget, prompt, prompt + step, math.ceil(sum(kept) / len(kept)))
        most, sizes = most + block(policy, step), [len(head) for head in cells(held)]
        assert sum(sizes) <= most * len(sizes)
        assert is_divided(policy) or max(sizes) <= most
        if prompt + step <= 9:
            assert held == whole.held[step]
    assert torch.equal(trace.prompt_logits, whole.prompt_logits)
    for step in range(1, 10 - prompt + 1):  # the step of the tenth token still sees all ten
        torch.testing.assert_close(trace.logits[step - 1], whole.logits[step - 1], **CLOSE)


@pytest.mark.parametrize("budget_name", BUDGETS)
def test_held_positions_are_unique_and_the_evicted_never_return(policy: Policy, budget_name: str) -> None:
    model = tiny_model("llama_gqa")
    cache = PolicyCache(model, policy, budget_named(budget_name, policy))
    trace = drive(model, cache, random_tokens(5, 1, PROMPT + STEPS), PROMPT)
    before = [tuple(range(PROMPT))] * len(cells(trace.held[0]))
    for step, held in enumerate(trace.held):
        for now, then in zip(cells(held), before, strict=True):
            assert len(set(now)) == len(now)
            assert set(now) <= {*then, PROMPT + step - 1}
        before = cells(held)


@pytest.mark.parametrize("budget_name", BUDGETS)
def test_sinks_and_recent_tokens_stay_as_the_policy_promises(policy: Policy, budget_name: str) -> None:
    if not isinstance(policy, ScorePolicy):
        pytest.skip("promises no sinks and no window")
    model, budget = tiny_model("llama_gqa"), budget_named(budget_name, policy)
    trace = drive(model, PolicyCache(model, policy, budget), random_tokens(6, 1, PROMPT + STEPS), PROMPT)
    kept_of_prompt = min(len(head) for head in cells(trace.held[0]))
    first = allowed(policy, budget, PROMPT, PROMPT, kept_of_prompt)
    for step, held in enumerate(trace.held):
        cut_at = PROMPT + step if When.DECODE in policy.when else PROMPT  # what came after the last cut all stays
        for layer in held:
            size = allowed(policy, budget, PROMPT, cut_at, kept_of_prompt)
            if is_divided(policy):  # a layer's own budget, which its heads share
                size = min(size, sum(len(head) for head in layer[0]) // len(layer[0]))
            sinks = min(policy.num_sinks, size - 1)
            share = math.floor(Fraction(str(policy.recent_fraction)) * size)
            recent = min(max(policy.num_recent, share), size - sinks)
            for head in layer[0]:
                # A budget that grew has room for sinks that are gone.
                assert {*range(min(sinks, first - 1)), *range(max(0, cut_at - recent), PROMPT + step)} <= set(head)


@pytest.mark.parametrize("reserve_tokens", [0, STEPS])
def test_bytes_are_really_freed(policy: Policy, positions: Any, reserve_tokens: int) -> None:
    if not policy.bounded or is_outcome(policy):
        pytest.skip("ignores the budget")
    model, prompt, budget = tiny_model("llama_gqa"), 240, 12
    cache = PolicyCache(model, policy, Budget(tokens=budget), positions=positions, reserve_tokens=reserve_tokens)
    trace = drive(model, cache, random_tokens(7, 1, prompt + STEPS), prompt)
    slot_bytes = 2 * 2 * 8 * 4  # key and value, KV heads, head size, float32
    peak = max(len(head) for held in trace.held for head in cells(held))
    full_bytes = 2 * slot_bytes * (prompt + STEPS)
    slack = block(policy, 1) + (0 if reserve_tokens or When.DECODE in policy.when else 64)
    assert cache.occupancy().stored_bytes <= 2 * slot_bytes * (peak + 1 + slack)
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}  # a policy may read the model's
    held_tensors = [t for t in tensors_of(cache) if t.untyped_storage().data_ptr() not in weights]
    most = full_bytes / 4 + 2 * slot_bytes * slack + sum(layer.ring_bytes for layer in cache.policy_layers)
    assert cache.occupancy().stored_bytes <= storage_bytes(held_tensors) < most
    assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in held_tensors)


def test_nothing_keeps_the_prompt_alive(policy: Policy, positions: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, storages = tiny_model("llama_gqa"), []
    update = PolicyLayer.update

    def noting_update(layer: PolicyLayer, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        storages.extend(weakref.ref(states.untyped_storage()) for states in (keys, values))
        return update(layer, keys, values, *args, **kwargs)

    monkeypatch.setattr(PolicyLayer, "update", noting_update)
    cache = PolicyCache(model, policy, Budget(tokens=6), positions=positions)
    drive(model, cache, random_tokens(8, 1, PROMPT), PROMPT)
    gc.collect()
    assert len(storages) == (8 if Needs.REPEATED in needs_of(policy) else 4)  # with what repeats the prompt
    assert all(storage() is None for storage in storages)


@pytest.mark.parametrize("budget_name", ["tokens", "third_of_seen"])
def test_the_same_input_gives_the_same_result_and_a_used_policy_is_as_good_as_new(
    policy: Policy, positions: Any, budget_name: str
) -> None:
    model, budget = tiny_model("llama_gqa"), budget_named(budget_name, policy)
    tokens, other = random_tokens(9, 1, PROMPT + STEPS), random_tokens(10, 1, 23)
    first = drive(model, PolicyCache(model, policy, budget, positions=positions), tokens, PROMPT)
    drive(model, PolicyCache(model, policy, budget, positions=positions), other, 19)
    again = drive(model, PolicyCache(model, policy, budget, positions=positions), tokens, PROMPT)
    assert first.held == again.held
    assert torch.equal(torch.stack(first.logits), torch.stack(again.logits))


def test_a_cache_that_was_reset_is_as_good_as_new(policy: Policy) -> None:
    model, tokens = tiny_model("llama_gqa"), random_tokens(9, 1, PROMPT + STEPS)
    cache = PolicyCache(model, policy, Budget(fraction=0.3))
    first = drive(model, cache, tokens, PROMPT)
    cache.reset()
    assert drive(model, cache, tokens, PROMPT).held == first.held
