"""Every yaml in conf/policy against references: the stock cache, the row alone, attention told what it sees."""

from __future__ import annotations

from typing import Any

import pytest

from kvbench.cache import Policy
from kvbench.contract import equality
from kvbench.contract.driving import TINY_MODELS
from kvbench.contract.terms import BUDGETS
from tests.contract import keep


@pytest.mark.cover("mechanisms", whole="pairs")
@pytest.mark.parametrize("name", TINY_MODELS)
def test_an_unlimited_budget_gives_the_logits_and_answers_of_the_stock_cache(
    policy: Policy, positions: Any, name: str
) -> None:
    keep(equality.equals_the_stock_cache, policy, model=name, positions=positions)


@pytest.mark.cover("mechanisms")
def test_interleaved_sequences_do_not_touch_each_other(policy: Policy, positions: Any) -> None:
    keep(equality.keeps_sequences_apart, policy, positions=positions)


def test_a_model_in_bfloat16_stores_bfloat16_under_the_budget(policy: Policy, positions: Any) -> None:
    keep(equality.takes_half_precision, policy, positions=positions)


@pytest.mark.cover(whole="pairs")
@pytest.mark.parametrize("budget_name", BUDGETS)
@pytest.mark.parametrize("name", ["llama_gqa", "llama_mha"])
def test_a_row_alone_is_the_same_row_in_a_left_padded_batch(
    policy: Policy, positions: Any, budget_name: str, name: str
) -> None:
    keep(equality.sees_no_pads, policy, budget=budget_name, model=name, positions=positions)


@pytest.mark.cover("mechanisms", whole="pairs")
@pytest.mark.parametrize("budget_name", ["one", "smallest", "tokens", "third_of_seen"])
@pytest.mark.parametrize("name", ["llama_gqa_8_2", "llama_mha"])
def test_eviction_equals_attention_that_cannot_see_what_was_evicted(
    policy: Policy, positions: Any, budget_name: str, name: str
) -> None:
    keep(equality.equals_masked_attention, policy, budget=budget_name, model=name, positions=positions)


@pytest.mark.cover(whole="pairs")
@pytest.mark.parametrize("budget_name", ["smallest", "tokens", "third_of_seen", "most_of_prompt", "unlimited"])
def test_a_second_turn_keeps_the_budget_and_sees_what_was_held(
    policy: Policy, positions: Any, budget_name: str
) -> None:
    keep(equality.goes_on_with_a_second_turn, policy, budget=budget_name, positions=positions)


@pytest.mark.cover("mechanisms")
@pytest.mark.parametrize("budget_name", ["tokens", "third_of_seen"])
def test_a_second_turn_in_a_left_padded_batch_is_that_of_the_row_alone(
    policy: Policy, positions: Any, budget_name: str
) -> None:
    keep(equality.goes_on_beside_longer_rows, policy, budget=budget_name, positions=positions)


@pytest.mark.cover("mechanisms")
@pytest.mark.parametrize("budget_name", ["tokens", "third_of_seen"])
@pytest.mark.parametrize("name", ["llama_gqa_8_2", "llama_mha"])
def test_the_attention_that_a_policy_reads_is_what_was_given(policy: Policy, budget_name: str, name: str) -> None:
    keep(equality.reads_the_attention_given, policy, budget=budget_name, model=name)
