"""A block of generated tokens is held, then the cache is planned as after a prompt: against plain lists, in place."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbench.cache import Budget, Needs, PolicyCache, ScorePolicy, View
from kvbench.contract.driving import drive, held_positions
from kvbench.errors import ConfigError
from kvbench.policies.h2o import H2O
from kvbench.policies.keyformer import Keyformer
from kvbench.policies.merge.nearest_cosine import NearestCosine
from kvbench.policies.r_kv import RKV
from kvbench.policies.random import Random
from kvbench.policies.snapkv import SnapKV
from kvbench.policies.snapkv_decode import SnapKVDecode
from tests.contract import MiddleFirst
from tests.covering import share_of
from tests.tiny_models import random_tokens, tiny_model

PROMPT, STEPS = 20, 30


def naive_held(every: int, budget: Budget, prompt: int, steps: int) -> list[list[int]]:
    """Positions after each pass of a policy that keeps the 2 oldest and then the newest."""
    held, passes = list(range(prompt)), []
    for step in range(steps + 1):
        seen = prompt + step
        if step:
            held.append(seen - 1)
        allowed = budget.entries(seen_tokens=seen, prompt_tokens=prompt)
        full = len(held) > allowed if step == 0 else len(held) - allowed >= every
        if full:
            held = held[: min(2, allowed - 1)] + held[min(2, allowed - 1) - allowed :]
        passes.append(list(held))
    return passes


@dataclass(frozen=True, kw_only=True)
class Newest(ScorePolicy):
    def score(self, view: View) -> Any:
        return view.position.float()


BUDGETS = st.one_of(
    st.builds(Budget, tokens=st.integers(3, 12)),
    st.builds(Budget, fraction=st.sampled_from([0.2, 0.5, 0.9]), of=st.sampled_from(["seen", "prompt"])),
)


@settings(max_examples=share_of(24), deadline=None, derandomize=True)
@given(every=st.integers(1, 9), budget=BUDGETS, reserve=st.sampled_from([0, STEPS]))
def test_a_block_is_held_then_cut_as_plain_lists_are(every: int, budget: Budget, reserve: int) -> None:
    model, policy = tiny_model("llama_gqa"), Newest(num_sinks=2, every_tokens=every)
    cache = PolicyCache(model, policy, budget, reserve_tokens=reserve)
    trace = drive(model, cache, random_tokens(3, 1, PROMPT + STEPS), PROMPT)
    for held, expected in zip(trace.held, naive_held(every, budget, PROMPT, STEPS), strict=True):
        assert {head for layer in held for row in layer for head in row} == {tuple(expected)}
    if reserve and budget.tokens is not None:
        assert all(layer.slots is not None and layer.slots.capacity == max(PROMPT if budget.tokens >= PROMPT else 0,
                   budget.tokens) + every for layer in cache.policy_layers)  # fmt: skip


def test_what_a_block_holds_beyond_the_budget_is_counted() -> None:
    model, cache_of = tiny_model("llama_gqa"), lambda every: MiddleFirst(every_tokens=every)
    bytes_of, held = {}, {}
    for every in (1, 8):
        cache = PolicyCache(model, cache_of(every), Budget(tokens=9), reserve_tokens=STEPS)
        trace = drive(model, cache, random_tokens(3, 1, PROMPT + 7), PROMPT)
        bytes_of[every] = cache.occupancy().stored_bytes
        held[every] = {len(head) for layer in trace.held[-1] for row in layer for head in row}
        assert [ledger.held for ledger in (layer.ledger for layer in cache.policy_layers)] == [[*held[every]]] * 2
    assert held == {1: {9}, 8: {16}}
    assert bytes_of[8] * 10 == bytes_of[1] * 17  # 9 entries and 1 or 8 more slots


@pytest.mark.parametrize(
    "policy",
    [
        H2O(every_tokens=5, merge=NearestCosine()),
        RKV(num_recent=4, every_tokens=5),
        SnapKVDecode(num_recent=6, every_tokens=5),
        Keyformer(history_tokens=6, every_tokens=5),
    ],
)
def test_a_block_is_cut_alike_alone_and_in_a_padded_batch(policy: ScorePolicy) -> None:
    model = tiny_model("llama_gqa")
    rows, more = [random_tokens(4, PROMPT), random_tokens(5, 7)], random_tokens(7, STEPS)
    tokens, mask = torch.zeros(2, PROMPT + STEPS, dtype=torch.int64), torch.ones(2, PROMPT + STEPS, dtype=torch.int64)
    for index, row in enumerate(rows):
        mask[index, : PROMPT - len(row)] = 0
        tokens[index] = torch.cat((torch.zeros(PROMPT - len(row), dtype=torch.int64), row, more))
    budget = Budget(fraction=0.4)
    together = drive(model, PolicyCache(model, policy, budget), tokens, PROMPT, mask)
    for index, row in enumerate(rows):
        alone = drive(model, PolicyCache(model, policy, budget), torch.cat((row, more))[None], len(row))
        for one, other in zip(together.held, alone.held, strict=True):
            assert [layer[index] for layer in one] == [layer[0] for layer in other]
        for one_step, other_step in zip(together.logits, alone.logits, strict=True):
            torch.testing.assert_close(one_step[index], other_step[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "policy",
    [
        Random(every_tokens=4),
        H2O(every_tokens=4, merge=NearestCosine()),
        RKV(num_recent=4, every_tokens=4),
        SnapKVDecode(num_recent=4, every_tokens=4),
        Keyformer(history_tokens=4, every_tokens=4),
    ],
)
def test_cutting_between_steps_is_cutting_within_them_and_moves_no_buffer(policy: ScorePolicy) -> None:
    """The graph engine cuts between captured steps, over the buffers that were captured."""
    model, tokens = tiny_model("llama_gqa"), random_tokens(3, 1, PROMPT + STEPS)
    within = drive(model, PolicyCache(model, policy, Budget(tokens=9)), tokens, PROMPT)
    cache = PolicyCache(model, policy, Budget(tokens=9), reserve_tokens=STEPS)
    drive(model, cache, tokens[:, :PROMPT], PROMPT)
    cache.cut_blocks(by_itself=False)
    addresses = [t.data_ptr() for layer in cache.policy_layers for t in (*layer.state(), layer.keys, layer.values)]  # type: ignore[union-attr]
    for at in range(PROMPT, PROMPT + STEPS):
        drive(model, cache, tokens[:, at : at + 1], 1)
        cache.cut_blocks()
        assert held_positions(cache) == within.held[at - PROMPT + 1]
    now = [t.data_ptr() for layer in cache.policy_layers for t in (*layer.state(), layer.keys, layer.values)]  # type: ignore[union-attr]
    assert now == addresses


@dataclass(frozen=True, kw_only=True)
class ReadsTheNewestRow(ScorePolicy):
    needs = Needs.PROBS

    def score(self, view: View) -> Any:
        return view.probs


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (SnapKV(every_tokens=4), "every_tokens is 4, but SnapKV cuts the prompt only"),
        (ReadsTheNewestRow(every_tokens=2), "reads PROBS, which is not there when a block"),
    ],
)
def test_a_rhythm_that_a_policy_cannot_keep_is_refused(policy: ScorePolicy, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PolicyCache(tiny_model("llama_gqa"), policy, Budget(tokens=9))
    with pytest.raises(ConfigError, match="every_tokens is 0"):
        PolicyCache(tiny_model("llama_gqa"), replace(policy, every_tokens=0), Budget(tokens=9))
