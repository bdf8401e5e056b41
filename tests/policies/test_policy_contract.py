"""The contract that every yaml in conf/policy is held to; a new yaml is tested with no registration.

The rules stand in `kvbench.contract`, where `kvbench check-policy` finds them too; here each meets every policy.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from kvbench.cache import Allocation, Budget, Merge, Policy
from kvbench.contract import holding
from kvbench.contract.catalogue import policy_named
from kvbench.contract.terms import BUDGETS, STEPS
from kvbench.contract.trial import RULES
from tests.contract import keep
from tests.covering import POSITIONS, YAMLS

TWO_BUDGETS = ["tokens", "third_of_seen"]


def test_every_policy_yaml_builds_a_frozen_policy(policy: Policy) -> None:
    keep(holding.is_frozen, policy)


@pytest.mark.cover(whole="pairs")
@pytest.mark.parametrize("budget_name", BUDGETS)
def test_what_is_held_is_the_whole_budget_and_no_more_with_what_is_protected_and_nothing_comes_back(
    policy: Policy, positions: Any, budget_name: str
) -> None:
    rules = holding.holds_its_budget, holding.uses_its_budget, holding.never_brings_back, holding.keeps_what_it_protects
    for rule in rules:  # one drive for all of them
        if rule.spares(policy) is None:
            keep(rule, policy, budget=budget_name, positions=positions)


@pytest.mark.parametrize("budget", holding.holds_its_share.values["budget"], ids=Budget.describe)
def test_every_layer_holds_what_the_allocation_gave_it(policy: Policy, budget: Budget) -> None:
    keep(holding.holds_its_share, policy, budget=budget)


@pytest.mark.cover(whole="pairs")
@pytest.mark.parametrize("prompt", [1, 8, 9, 10, 36])
def test_prompts_may_be_shorter_or_longer_than_the_budget(policy: Policy, positions: Any, prompt: int) -> None:
    keep(holding.takes_any_prompt, policy, prompt=prompt, positions=positions)


@pytest.mark.parametrize("reserve_tokens", [0, STEPS])
def test_bytes_are_really_freed(policy: Policy, positions: Any, reserve_tokens: int) -> None:
    keep(holding.frees_bytes, policy, reserve=reserve_tokens, positions=positions)


def test_nothing_keeps_the_prompt_alive(policy: Policy, positions: Any) -> None:
    keep(holding.lets_the_prompt_go, policy, positions=positions)


@pytest.mark.parametrize("budget_name", TWO_BUDGETS)
def test_the_same_input_gives_the_same_result_and_a_used_policy_or_cache_is_as_good_as_new(
    policy: Policy, positions: Any, budget_name: str
) -> None:
    keep(holding.repeats_itself, policy, budget=budget_name, positions=positions)


@pytest.mark.parametrize("budget_name", TWO_BUDGETS)
def test_a_policy_changes_nothing_that_it_is_shown(policy: Policy, budget_name: str) -> None:
    keep(holding.leaves_its_view_alone, policy, budget=budget_name)


@pytest.mark.parametrize("budget_name", TWO_BUDGETS)
def test_a_decode_step_waits_for_no_number_of_the_device(policy: Policy, budget_name: str) -> None:
    keep(holding.waits_for_nothing, policy, budget=budget_name)


@pytest.mark.parametrize("budget_name", ["smallest", "tokens", "third_of_seen"])
def test_what_stays_is_what_scores_best(policy: Policy, budget_name: str) -> None:
    keep(holding.keeps_the_best, policy, budget=budget_name)


@pytest.mark.parametrize("budget_name", TWO_BUDGETS)
def test_entries_are_merged_as_the_plan_says(policy: Policy, budget_name: str) -> None:
    keep(holding.merges_as_planned, policy, budget=budget_name)


COMPARED_ELSEWHERE = {  # with the code that was released
    "ElasticReleased": "policies/test_released_equality.py",
    "H2OElasticRelease": "policies/test_released_departures.py",
    "H2OReleased": "policies/test_released_departures.py",
    "LocalElasticRelease": "policies/test_released_equality.py",
    "StreamingLLMReleased": "policies/test_released_equality.py",
}


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_every_score_and_part_meets_a_slow_twin(path: Path) -> None:
    """A new yaml's class and parts are named in a test that compares with plain lists, on random input."""
    tests, policy = Path(__file__).parents[1], policy_named(path.stem)
    texts = [file.read_text() for folder in ("policies", "cache") for file in (tests / folder).glob("test_*.py")]
    slow = "\n".join(text for text in texts if "@given" in text or "naive" in text)
    for one in (policy, getattr(policy, "allocation", None), getattr(policy, "merge", None)):
        name = type(one).__name__
        if isinstance(one, Policy | Allocation | Merge) and not re.search(rf"\b{name}\b", slow):
            assert name in COMPARED_ELSEWHERE, f"{name} is compared with no slow reference"
            assert re.search(rf"\b{name}\b", (tests / COMPARED_ELSEWHERE[name]).read_text())


def test_every_rule_of_the_contract_is_tried_here_or_beside() -> None:
    from tests.policies import test_policy_contract, test_policy_equivalence

    used = {
        name
        for module in (test_policy_contract, test_policy_equivalence)
        for test in vars(module).values()
        if callable(test) and getattr(test, "__name__", "").startswith("test_")
        for name in test.__code__.co_names
    }
    assert {rule.name for rule in RULES} <= used
    assert len(RULES) == len({rule.sentence for rule in RULES}) == 22


def test_each_rule_is_tried_with_each_of_its_values() -> None:
    for rule in RULES:
        cases = list(rule.cases())
        assert len(cases) == max([1, *map(len, rule.values.values())])
        for name, values in rule.values.items():
            assert {case[name] for case in cases} == set(values), rule.name
    assert POSITIONS == ("original", "in_cache", "released")
