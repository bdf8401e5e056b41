"""Every yaml in conf/policy against references: the stock cache, the row alone, attention told what it sees."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from kvbench.cache import UNLIMITED, Budget, Policy, PolicyCache, When, cache_argument
from kvbench.cache.policy import merge_at_decode
from tests.contract import (
    BUDGETS,
    CLOSE,
    PROMPT,
    STEPS,
    allowed,
    block,
    budget_named,
    cells,
    is_divided,
    left_padded,
    merges,
)
from tests.driving import Trace, drive, held_positions, repeat_where_asked
from tests.reference import visible_entries, visible_logits
from tests.tiny_models import random_tokens, tiny_model

ROUNDED = {"rtol": 1e-5, "atol": 3e-5}  # models normalise in float32: 2e-6 to 8e-6 as a rule, seldom 1.5e-5
STEPS_OF_ROWS = 8  # of a fraction two more entries are allowed in them, and in all others one goes


@cache
def stock_trace(name: str) -> Trace:
    """Two rows through transformers' own cache, once for all policies and position modes."""
    return drive(tiny_model(name, attached=False), DynamicCache(), random_tokens(1, 2, PROMPT + STEPS), PROMPT)


@cache
def stock_answer(name: str) -> list[list[int]]:
    """Two rows of different length and the answers of transformers' own cache, once for all."""
    prompt, mask = left_padded([random_tokens(2, 11), random_tokens(3, 17)])
    answer = tiny_model(name, attached=False).generate(
        prompt, attention_mask=mask, max_new_tokens=STEPS, do_sample=False
    )
    return answer.tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["llama_gqa", "llama_gqa_8_2", "llama_mha", "qwen2", "qwen3"])
def test_an_unlimited_budget_gives_the_logits_of_the_stock_cache(policy: Policy, positions: Any, name: str) -> None:
    model, tokens = tiny_model(name), random_tokens(1, 2, PROMPT + STEPS)
    ours = drive(model, PolicyCache(model, policy, UNLIMITED, positions=positions), tokens, PROMPT)
    theirs = stock_trace(name)
    torch.testing.assert_close(ours.prompt_logits, theirs.prompt_logits, **CLOSE)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(theirs.logits), **CLOSE)


@pytest.mark.parametrize("name", ["llama_gqa", "llama_mha"])
def test_generate_with_an_unlimited_budget_gives_the_tokens_of_the_stock_cache(
    policy: Policy, positions: Any, name: str
) -> None:
    model = tiny_model(name)
    prompt, mask = left_padded([random_tokens(2, 11), random_tokens(3, 17)])
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": STEPS, "do_sample": False}
    ours = model.generate(prompt, **cache_argument(model, PolicyCache(model, policy, positions=positions)), **options)
    assert ours.tolist() == stock_answer(name)


def test_interleaved_sequences_do_not_touch_each_other(policy: Policy, positions: Any) -> None:
    model, prompts = tiny_model("llama_gqa"), (random_tokens(11, 1, 20), random_tokens(12, 1, 30))
    caches = [PolicyCache(model, policy, Budget(fraction=0.3), positions=positions) for _ in prompts]
    steps: list[list[Tensor]] = [[], []]
    with torch.no_grad():
        for start, end in [(0, 14), (14, 15), (15, 16), (16, 20)]:
            for logits, tokens, cache in zip(steps, prompts, caches, strict=True):
                logits.append(model(tokens[:, start:end], **cache_argument(model, cache)).logits)
                repeat_where_asked(model, cache, tokens[:, :end])
        for logits, tokens in zip(steps, prompts, strict=True):
            cache = PolicyCache(model, policy, Budget(fraction=0.3), positions=positions)
            for start, end, interleaved in [(0, 14, 0), (14, 15, 1), (15, 16, 2), (16, 20, 3)]:
                alone = model(tokens[:, start:end], **cache_argument(model, cache)).logits
                repeat_where_asked(model, cache, tokens[:, :end])
                assert torch.equal(alone, logits[interleaved])


@cache
def rounded_model() -> Any:
    """Return a tiny model in bfloat16, once for all."""
    return copy.deepcopy(tiny_model("llama_gqa")).bfloat16()


def test_a_model_in_bfloat16_stores_bfloat16_under_the_budget(policy: Policy, positions: Any) -> None:
    model, tokens = rounded_model(), random_tokens(4, 1, PROMPT + STEPS)
    trace = drive(model, PolicyCache(model, policy, Budget(tokens=9), positions=positions), tokens, PROMPT)
    whole = drive(model, PolicyCache(model, policy, UNLIMITED), tokens[:, :PROMPT], PROMPT)
    keys = trace.cache.policy_layers[0].keys
    assert keys is not None
    assert keys.dtype == torch.bfloat16
    assert torch.equal(trace.prompt_logits, whole.prompt_logits)
    assert all(bool(torch.isfinite(step).all()) for step in trace.logits)


@pytest.mark.parametrize("budget_name", BUDGETS)
@pytest.mark.parametrize("name", ["llama_gqa", "llama_mha"])
def test_a_row_alone_is_the_same_row_in_a_left_padded_batch(
    policy: Policy, positions: Any, budget_name: str, name: str
) -> None:
    model, budget = tiny_model(name, double=True), budget_named(budget_name, policy)
    lengths = (9, PROMPT, 16)
    rows = [random_tokens(20 + index, length + STEPS_OF_ROWS) for index, length in enumerate(lengths)]
    tokens, mask = left_padded(rows)
    cache = PolicyCache(model, policy, budget, positions=positions)
    batch = drive(model, cache, tokens, max(lengths), mask)
    for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        alone = drive(model, PolicyCache(model, policy, budget, positions=positions), row[None], length)
        assert [[layer[index] for layer in held] for held in batch.held] == [
            [layer[0] for layer in held] for held in alone.held
        ]
        together = torch.stack([step[index] for step in batch.logits])
        torch.testing.assert_close(together, torch.stack(alone.logits)[:, 0], **CLOSE)
        torch.testing.assert_close(batch.prompt_logits[index, -length:], alone.prompt_logits[0], **CLOSE)


@pytest.mark.parametrize("budget_name", ["one", "smallest", "tokens", "third_of_seen"])
@pytest.mark.parametrize("name", ["llama_gqa_8_2", "llama_mha"])
def test_eviction_equals_attention_that_cannot_see_what_was_evicted(
    policy: Policy, positions: Any, budget_name: str, name: str
) -> None:
    """The oracle: plain attention over all tokens, with exactly what was held in sight of each query."""
    model, budget, prompt = tiny_model(name, double=True), budget_named(budget_name, policy), PROMPT
    if merge_at_decode(policy) is not None:
        pytest.skip("merges at decode: what was evicted is seen in others; tests.naive_merges is its reference")
    if merges(policy):
        budget, prompt = Budget(tokens=9), 9  # nothing to merge: only decode evicts
    tokens = random_tokens(30, 1, prompt + STEPS)
    trace = drive(model, PolicyCache(model, policy, budget, positions=positions), tokens, prompt)
    visible = visible_entries([[layer[0] for layer in held] for held in trace.held], prompt)
    expected = visible_logits(model, tokens[0], visible, positions=positions)
    logits = torch.stack(trace.logits)[:, 0].double()
    torch.testing.assert_close(trace.prompt_logits[0].double(), expected[:prompt], **CLOSE)
    torch.testing.assert_close(logits, expected[prompt:], **ROUNDED)


@pytest.mark.parametrize("budget_name", ["smallest", "tokens", "third_of_seen", "unlimited"])
def test_a_second_turn_keeps_the_budget_and_sees_what_was_held(
    policy: Policy, positions: Any, budget_name: str
) -> None:
    """Several tokens after eviction: chunks of 24, 1, 1, 1, 7 and 1, 1 tokens on one cache."""
    model, budget = tiny_model("llama_gqa", double=True), budget_named(budget_name, policy)
    turns = (PROMPT, 1, 1, 1, 7, 1, 1)
    tokens = random_tokens(31, 1, sum(turns))
    cache = PolicyCache(model, policy, budget, positions=positions)
    logits, sees, start = [], [], 0
    for turn in turns:
        before = [layer[0] for layer in held_positions(cache)] if start else [[()] * 2] * 2
        with torch.no_grad():
            logits.append(model(tokens[:, start : start + turn], **cache_argument(model, cache)).logits[0])
            repeat_where_asked(model, cache, tokens[:, : start + turn])
        for at in range(start, start + turn):
            sees.append([[(*head, *range(start, at + 1)) for head in layer] for layer in before])
        start += turn
        assert cache.get_seq_length() == start
        if When.DECODE in policy.when and When.PREFILL in policy.when:
            sizes = [len(head) for head in cells(held_positions(cache))]
            most = allowed(policy, budget, PROMPT, start, 0) + block(policy, 1)
            assert sum(sizes) <= most * len(sizes)
            assert is_divided(policy) or max(sizes) <= most
    if not merges(policy):
        expected = visible_logits(model, tokens[0], sees, positions=positions)
        torch.testing.assert_close(torch.cat(logits).double(), expected, **ROUNDED)


@pytest.mark.parametrize("budget_name", ["tokens", "third_of_seen"])
def test_a_second_turn_in_a_left_padded_batch_is_that_of_the_row_alone(
    policy: Policy, positions: Any, budget_name: str
) -> None:
    model, budget, lengths = tiny_model("llama_mha", double=True), budget_named(budget_name, policy), (13, PROMPT)
    rows = [random_tokens(40 + index, length + 8) for index, length in enumerate(lengths)]
    tokens, mask = left_padded(rows)
    place = (mask.cumsum(-1) - 1).clamp(min=0)
    caches = [PolicyCache(model, policy, budget, positions=positions) for _ in range(3)]
    passes = [(0, PROMPT), (PROMPT, PROMPT + 1), (PROMPT + 1, PROMPT + 6), (PROMPT + 6, PROMPT + 7)]
    for start, end in passes:
        given = {"attention_mask": mask[:, :end], "position_ids": place[:, start:end]}
        with torch.no_grad():
            together = model(tokens[:, start:end], **cache_argument(model, caches[2]), **given).logits
            repeat_where_asked(model, caches[2], tokens[:, :end], mask[:, :end])
            for index, length in enumerate(lengths):
                first = max(0, start - PROMPT + length)
                alone = model(
                    rows[index][None, first : end - PROMPT + length], **cache_argument(model, caches[index])
                ).logits
                repeat_where_asked(model, caches[index], rows[index][None, : end - PROMPT + length])
                torch.testing.assert_close(together[index, -alone.shape[1] :], alone[0], **CLOSE)
                assert [layer[index] for layer in held_positions(caches[2])] == [
                    layer[0] for layer in held_positions(caches[index])
                ]
