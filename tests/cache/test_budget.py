"""Budgets: how many entries, and what is refused."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbench.cache import UNLIMITED, Budget
from kvbench.errors import ConfigError
from tests.covering import share_of


@settings(max_examples=share_of(300), deadline=None, derandomize=True)
@given(thousandths=st.integers(1, 1000), seen=st.integers(1, 100_000), prompt=st.integers(1, 100_000))
def test_a_fraction_is_rounded_down_in_exact_decimals(thousandths: int, seen: int, prompt: int) -> None:
    fraction = thousandths / 1000
    for of, base in (("seen", seen), ("prompt", prompt)):
        budget = Budget(fraction=fraction, of=of)  # type: ignore[arg-type]
        exact = math.floor(Decimal(str(fraction)) * base)
        assert budget.entries(seen_tokens=seen, prompt_tokens=prompt) == max(1, exact)


@pytest.mark.parametrize(("fraction", "seen", "entries"), [(0.29, 100, 29), (0.57, 100, 57), (0.58, 50, 29)])
def test_a_product_just_below_a_whole_number_is_that_number(fraction: float, seen: int, entries: int) -> None:
    assert int(fraction * seen) == entries - 1
    assert Budget(fraction=fraction).entries(seen_tokens=seen, prompt_tokens=1) == entries


def test_absolute_tokens_do_not_depend_on_the_sequence() -> None:
    assert {Budget(tokens=7).entries(seen_tokens=n, prompt_tokens=n) for n in (1, 7, 5000)} == {7}


@pytest.mark.parametrize("seen", [1, 2, 31, 4096])
def test_unlimited_is_everything_seen(seen: int) -> None:
    assert UNLIMITED.entries(seen_tokens=seen, prompt_tokens=1) == seen


@pytest.mark.parametrize(
    "settings_of",
    [
        {},
        {"fraction": 0.2, "tokens": 3},
        {"fraction": 0.0},
        {"fraction": 1.4},
        {"fraction": math.nan},
        {"tokens": 0},
        {"tokens": 3, "of": "answer"},
    ],
)
def test_a_budget_out_of_range_is_refused(settings_of: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="budget"):
        Budget(**settings_of)


def test_a_budget_says_in_words_what_it_is() -> None:
    budgets = (Budget(tokens=64), Budget(fraction=0.2), Budget(fraction=0.125, of="prompt"))
    assert [budget.describe() for budget in budgets] == ["64 tokens", "20 % of seen", "12.5 % of prompt"]
