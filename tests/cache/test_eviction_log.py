"""The log against what the cache really held after every pass, and against the naive layer."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvbench.cache import Budget, Policy, PolicyCache, ScorePolicy, cache_argument
from kvbench.cache.counts import LayerSetup
from kvbench.cache.layer import PolicyLayer
from kvbench.cache.recording import EvictionLog
from kvbench.contract.driving import held_positions, left_padded, repeat_where_asked
from kvbench.contract.terms import PROMPT, STEPS, budget_named
from kvbench.policies.elastic import Elastic
from kvbench.policies.h2o import H2O
from kvbench.policies.merge.cam import CaM
from kvbench.policies.random import Random
from kvbench.policies.streaming_llm import StreamingLLM
from tests.covering import share_of
from tests.naive import NaiveLayer, Rule
from tests.naive_rules import NaiveElastic, NaiveH2O, NaiveRandom, NaiveStreaming, buckets
from tests.tiny_models import random_tokens, tiny_model

PAIRS: list[tuple[Policy, Callable[[], Rule]]] = [
    (StreamingLLM(), NaiveStreaming),
    (H2O(), NaiveH2O),
    (Random(), NaiveRandom),
    (Elastic(fixed_point=4), lambda: NaiveElastic(fixed_point=4)),
]


@torch.no_grad()
def logged(
    policy: Policy, budget: Budget, tokens: Tensor, mask: Tensor, prompt: int, ends: list[int]
) -> tuple[EvictionLog, list[Any]]:
    """Drive rows that each end at their own time; return the log and what was held after every pass."""
    model, log = tiny_model("llama_gqa"), EvictionLog(num_tokens=tokens.shape[1])
    cache = PolicyCache(model, policy, budget, on_plan=log.note_plan)
    place = (mask.cumsum(-1) - 1).clamp(min=0)
    held = []
    for start, end in [(0, prompt), *((at, at + 1) for at in range(prompt, tokens.shape[1]))]:
        model(
            tokens[:, start:end],
            attention_mask=mask[:, :end],
            position_ids=place[:, start:end],
            **cache_argument(model, cache),
        )
        repeat_where_asked(model, cache, tokens[:, :end], mask[:, :end])
        if start:
            log.after_step(cache, [start - prompt < steps for steps in ends])
        else:
            log.after_prompt(cache)
        held.append(held_positions(cache))
    return log, held


@pytest.mark.cover("mechanisms")
@pytest.mark.parametrize("budget_name", ["one", "tokens", "third_of_seen", "third_of_prompt", "unlimited"])
def test_the_log_says_when_each_entry_left(policy: Policy, budget_name: str) -> None:
    lengths, ends = (PROMPT, PROMPT - 9), [STEPS, STEPS - 5]
    tokens, mask = left_padded([random_tokens(20 + row, length + STEPS) for row, length in enumerate(lengths)])
    log, held = logged(policy, budget_named(budget_name, policy), tokens, mask, PROMPT, ends)
    for row, length in enumerate(lengths):
        freed = log.freed(row)
        assert freed.shape == (2, 2, PROMPT + STEPS)
        for layer in range(2):
            for head in range(2):
                for step in range(ends[row] + 1):
                    left = freed[layer, head, : length + step]
                    said = [p for p, at in enumerate(left.tolist()) if at == -1 or at > step]
                    assert said == list(held[step][layer][row][head])
        assert bool((freed[..., length + ends[row] :] == -1).all())
        assert int(freed.max()) <= ends[row], "what happens to a row that has ended is not its story"


@given(
    pair=st.sampled_from(PAIRS),
    prompt=st.integers(1, 16),
    budget=st.one_of(st.builds(Budget, tokens=st.integers(1, 12)), st.builds(Budget, fraction=st.just(0.4))),
    seed=st.integers(0, 2**31 - 1),
)
@settings(max_examples=share_of(60), deadline=None)
def test_the_log_is_the_naive_layers_story(
    pair: tuple[Policy, Callable[[], Rule]], prompt: int, budget: Budget, seed: int
) -> None:
    policy, rule = pair
    log = EvictionLog(num_tokens=prompt + 8)
    layer = layer_of(policy, budget, log)
    naive = NaiveLayer(rule=rule(), budget=budget, num_heads=2)
    draw = torch.Generator().manual_seed(seed)
    cache: Any = SimpleNamespace(policy_layers=[layer])
    story: dict[tuple[int, int], int] = {}
    before: list[set[int]] = [set(), set()]
    for step in range(9):
        new = prompt if step == 0 else 1
        query, key, value = (torch.randn(1, 2, new, 4, generator=draw) for _ in range(3))
        keys, values = layer.update(key, value)
        layer.attend(query, keys, values, 0.5, None)
        (log.after_step(cache, [True]) if step else log.after_prompt(cache))
        naive.forward(query[0], key[0], value[0])
        for head, entries in enumerate(naive.heads):
            now = {entry.position for entry in entries}
            fresh = set(range(naive.seen - new, naive.seen))
            story |= {(head, gone): step for gone in (before[head] | fresh) - now}
            before[head] = now
    if naive.rule.margin > 1e-4:  # a choice that no rounding could have turned
        said = {(h, p): int(at) for h, row in enumerate(log.freed(0)[0]) for p, at in enumerate(row) if at >= 0}
        assert said == story


def layer_of(policy: Policy, budget: Budget, log: EvictionLog) -> PolicyLayer:
    return PolicyLayer(
        LayerSetup(
            layer=0,
            num_layers=1,
            policy=policy,
            budget=budget,
            rotation=None,
            reserve_tokens=0,
            prompt_kind=None,
            on_plan=log.note_plan,
        )
    )


def test_merged_entries_are_those_of_the_papers_buckets() -> None:
    tokens = random_tokens(3, 1, PROMPT)
    log, held = logged(Elastic(), Budget(tokens=9), tokens, torch.ones_like(tokens), PROMPT, [0])
    merged = log.merged_into(0)
    assert merged is not None
    for layer in range(2):
        anchors = [p for p in held[0][layer][0][0] if p not in (0, PROMPT - 1)]
        cells = dict(zip(anchors, buckets(anchors, PROMPT), strict=True))
        expected = {
            p: anchor for anchor, cell in cells.items() for p in cell if p != anchor and p not in (0, PROMPT - 1)
        }
        for head in merged[layer]:
            assert {p: int(into) for p, into in enumerate(head) if into >= 0} == expected


def test_a_policy_that_drops_merges_nothing(policy: Policy) -> None:
    part = policy.merge if isinstance(policy, ScorePolicy) else None
    if "elastic" in type(policy).__name__.lower() or not (part is None or isinstance(part, CaM)):
        pytest.skip("merges")  # CaM gives to several, and what it gives to is no one's place
    tokens = random_tokens(3, 1, PROMPT)
    log, _ = logged(policy, Budget(tokens=9), tokens, torch.ones_like(tokens), PROMPT, [0])
    assert log.merged_into(0) is None


@pytest.mark.few(6)
@pytest.mark.cover("mechanisms")
def test_looking_changes_nothing(policy: Policy) -> None:
    tokens = random_tokens(9, 1, PROMPT + STEPS)
    budget = budget_named("third_of_seen", policy)
    _, seen = logged(policy, budget, tokens, torch.ones_like(tokens), PROMPT, [STEPS])
    model, cache = tiny_model("llama_gqa"), PolicyCache(tiny_model("llama_gqa"), policy, budget)
    alone = []
    with torch.no_grad():
        for start, end in [(0, PROMPT), *((at, at + 1) for at in range(PROMPT, PROMPT + STEPS))]:
            model(tokens[:, start:end], **cache_argument(model, cache))
            repeat_where_asked(model, cache, tokens[:, :end])
            alone.append(held_positions(cache))
    assert seen == alone
