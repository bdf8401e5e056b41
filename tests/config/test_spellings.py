"""Two spellings of one value are one setting: one key, one label, one W&B config; two values are two."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbench.config.build import build_cell
from kvbench.config.checks import rounded, typed, typed_settings
from kvbench.config.compose import compose_grid
from kvbench.results.files import canonical_json
from kvbench.results.record import cell_key
from kvbench.sinks.wandb.content import run_config

SHARES = st.integers(10**8, 10**12).map(lambda number: number / 10**9)  # what 9 decimals can tell apart
FINITE = st.floats(allow_nan=False, allow_infinity=False)


@given(SHARES, st.floats(-4e-11, 4e-11))
def test_a_number_and_the_same_with_the_noise_of_arithmetic_are_one_value(share: float, noise: float) -> None:
    assert typed(share + noise, float) == share
    assert cell_key({"x": typed(share + noise, float)}) == cell_key({"x": typed(share, float | None)})


@given(SHARES, SHARES)
def test_two_keys_are_equal_only_where_the_values_are(one: float, other: float) -> None:
    keys = [cell_key({"x": typed(value, float)}) for value in (one, other)]
    assert (keys[0] == keys[1]) == (one == other)


@given(st.integers(-(2**53), 2**53))
def test_a_whole_number_is_the_float_that_a_float_setting_means_by_it(number: int) -> None:
    as_float, as_int = typed(number, float | None), typed(float(number), float)
    assert isinstance(as_float, float)
    assert cell_key({"x": as_float}) == cell_key({"x": as_int})
    assert isinstance(typed(number, int), int)
    assert isinstance(typed(number, int | float), int), "a class that takes both may tell them apart"


@given(FINITE)
def test_rounding_is_done_after_one_time_and_never_makes_nothing_of_a_small_number(value: float) -> None:
    assert rounded(rounded(value)) == rounded(value)
    assert math.isclose(rounded(value), value, rel_tol=6e-9)
    assert (rounded(value) == 0) == (value == 0)
    assert math.copysign(1, rounded(0.0 * math.copysign(1, value))) == 1, "there is one zero"


@pytest.mark.parametrize(
    ("value", "hint", "meant"),
    [
        (True, float | bool, True),
        (None, float | None, None),
        ("1", str, "1"),
        ([1, 0.1 + 0.2], list[float], [1.0, 0.3]),
        ((1, 2), tuple[float, ...], (1.0, 2.0)),
        ({"a": 1}, dict[str, float], {"a": 1.0}),
        ({"scale": 1 / math.sqrt(128), "size": 1}, dict[str, Any], {"scale": 1 / math.sqrt(128), "size": 1}),
        (math.inf, float, math.inf),
        ("max", Literal["max"], "max"),
    ],
)
def test_a_value_becomes_what_its_type_says(value: Any, hint: Any, meant: Any) -> None:
    assert repr(typed(value, hint)) == repr(meant)


def test_settings_are_all_of_a_dataclass_and_what_is_given_to_another_class() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Whole:
        share: float = 0.1 + 0.2
        tokens: int = 4

    class Plain:
        def __init__(self, share: float, name: str = "x") -> None:
            self.share = share

    assert typed_settings(Whole(), {}) == {"share": 0.3, "tokens": 4}
    assert repr(typed_settings(Plain(1), {"share": 1})) == "{'share': 1.0}"


ONE = "budget.fraction=0.3 policy.recent_fraction=0 +policy.num_sinks=0 task.memory.batch_size=1 dataset.first=0"
OTHER = "budget.fraction=0.30000000000000004 policy.recent_fraction=-0.0 ~task.memory.batch_size ~dataset.first"


def test_one_cell_has_one_key_one_set_of_labels_and_one_config_however_it_is_spelled() -> None:
    composed = [
        compose_grid(["policy=h2o", *line.split()], multirun=False, config_dir=None)[0] for line in (ONE, OTHER)
    ]
    cells = [build_cell(one) for one in composed]
    assert cells[0].key == cells[1].key
    body: dict[str, Any] = {"sweep": "s", "environment": {}}
    told = [run_config({**body, "key": cell.key, "cell": cell.settings, "labels": cell.labels}) for cell in cells]
    assert canonical_json(told[0]) == canonical_json(told[1])
    assert repr(cells[0].setting) == repr(cells[1].setting), "what is measured is what is in the key"
    assert (cells[0].labels["budget"], cells[0].labels["budget_fraction"]) == ("30 % of seen", 0.3)


def test_a_range_of_shares_is_the_shares_that_were_meant() -> None:
    grid = compose_grid(["policy=h2o", "budget.fraction=range(0.1,0.5,0.1)"], multirun=True, config_dir=None)
    cells = [build_cell(composed) for composed in grid]
    assert [cell.labels["budget_fraction"] for cell in cells] == [0.1, 0.2, 0.3, 0.4]
    assert [cell.settings["budget"]["fraction"] for cell in cells] == [0.1, 0.2, 0.3, 0.4]
