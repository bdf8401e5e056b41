"""Main effects and interactions are those that went into the records; a grid with holes loses whole levels."""

from __future__ import annotations

import random
from collections.abc import Iterable
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbench.report.factorial import (
    Grid,
    cells_markdown,
    effects_svg,
    factorial_csv,
    grid_of,
    interactions_markdown,
    main_effects_markdown,
    shares_markdown,
)
from kvbench.report.load import Results, parse_cell
from tests.report.synthetic import body

SCORES, ALLOCATIONS, MERGES = ("a", "b", "c"), ("uniform", "ada"), ("drop", "voronoi")
WORDS = {"dataset": "scenes", "factors": "score,allocation"}


def record(levels: tuple[str, ...] | None, nll: float, noise: float = 0.0) -> dict[str, Any]:
    """A cell of 24 samples of 50 tokens; how hard a sample is differs more than anything else does."""
    made = body(policy="full" if levels is None else "+".join(levels), budget=None if levels is None else 0.2)
    rng = random.Random(str(levels))
    made["samples"] = [
        {"id": f"s{n}", "nll_sum": 50 * (nll + 0.3 * (n % 5) + rng.gauss(0, noise)), "num_scored_tokens": 50}
        for n in range(24)
    ]
    return made


def results_of(cells: Iterable[dict[str, Any]]) -> Results:
    return Results(records=tuple(parse_cell(one) for one in (record(None, 1.0), *cells)), problems=())


def grid(nats: dict[tuple[str, ...], float], noise: float = 0.0) -> Grid:
    found = grid_of(results_of(record(levels, nll, noise) for levels, nll in nats.items()), "scenes")
    assert found is not None
    return found


ALL = list(product(SCORES, ALLOCATIONS, MERGES))


@settings(max_examples=4)
@given(st.lists(st.floats(0.5, 3), min_size=len(ALL), max_size=len(ALL)))
def test_effects_add_up_to_the_cells_they_are_taken_from(values: list[float]) -> None:
    nats = dict(zip(ALL, values, strict=True))
    found = grid(nats)
    mean = float(np.mean(values))
    parts = [
        {tuple(one.levels.items()): one.value for one in found.effects(factors)}
        for factors in (
            ("score",), ("allocation",), ("merge",), ("score", "allocation"), ("score", "merge"),
            ("allocation", "merge"), ("score", "allocation", "merge"),
        )
    ]  # fmt: skip
    for levels, value in nats.items():
        own = dict(zip(("score", "allocation", "merge"), levels, strict=True))
        added = sum(one for part in parts for names, one in part.items() if set(names) <= set(own.items()))
        assert mean + added == pytest.approx(value, abs=1e-9)
    for part in parts[:3]:
        assert sum(part.values()) == pytest.approx(0, abs=1e-9)


def test_an_effect_is_found_among_samples_that_differ_by_more() -> None:
    worth = {"a": 0.0, "b": 0.05, "c": 0.1, "uniform": 0.0, "ada": -0.04, "drop": 0.0, "voronoi": 0.2}
    found = grid({levels: 2 + sum(worth[level] for level in levels) for levels in ALL}, noise=0.02)
    effects = {one.levels["merge"]: one for one in found.effects(("merge",))}
    assert effects["voronoi"].value == pytest.approx(0.1, abs=0.01)
    assert effects["voronoi"].is_clear
    low, high = effects["voronoi"].low, effects["voronoi"].high
    assert low is not None
    assert high is not None
    assert low < 0.1 < high < low + 0.03
    assert not any(one.is_clear and abs(one.value) > 0.01 for one in found.effects(("score", "allocation")))


def test_shares_of_the_variance_add_up_to_one_and_follow_the_effects() -> None:
    worth = {"voronoi": 0.4, "b": 0.1}
    found = grid({levels: 2 + sum(worth.get(level, 0) for level in levels) for levels in ALL}).shares()
    assert sum(share for _, share, _, _ in found) == pytest.approx(1)
    by_factor = {factors: share for factors, share, _, _ in found}
    assert by_factor["merge",] > 0.9
    assert by_factor["score", "merge"] == pytest.approx(0, abs=1e-9)
    assert all(low <= share + 1e-9 and share <= high + 1e-9 for _, share, low, high in found)


def test_a_level_that_lacks_a_cell_is_left_out_whole_and_said() -> None:
    nats = {levels: 2.0 + 0.1 * ("ada" in levels) for levels in ALL if levels != ("c", "ada", "voronoi")}
    found = grid(nats)
    assert found.levels == (("a", "b"), ALLOCATIONS, MERGES)
    assert found.left_out == ("score c",)
    results = results_of(record(levels, nll) for levels, nll in nats.items())
    lines = list(main_effects_markdown(results, WORDS))
    assert "Left out, because a combination was refused, failed or is not measured yet: score c." in lines
    assert lines[-1].startswith("`kvbench +experiment=factorial factorial.parts=[")


@pytest.mark.parametrize("newest_first", [True, False])
def test_of_a_combination_measured_again_since_its_part_was_mended_the_newest_counts(newest_first: bool) -> None:
    levels = ("a", "ada", "voronoi")
    mended = record(levels, 1.5) | {"key": "f" * 64, "started_utc": "2026-11-24T13:00:00+00:00"}
    cells = [*(record(other, 2.0) for other in ALL), mended]
    found = grid_of(results_of(cells[::-1] if newest_first else cells), "scenes")
    assert found is not None
    assert found.cells[levels].key == mended["key"]


def test_tables_and_figure_say_the_same_and_nothing_is_said_of_no_grid() -> None:
    results = results_of(record(levels, 2 + 0.1 * ("ada" in levels)) for levels in ALL)
    main = list(main_effects_markdown(results, WORDS))
    assert any(line.startswith("| allocation | uniform | -0.050") for line in main)
    assert len(list(interactions_markdown(results, WORDS))) == 2 + len(SCORES)
    assert len(list(cells_markdown(results, WORDS))) == 2 + len(SCORES) * len(MERGES)
    assert any("| allocation | 100.0 % [100.0, 100.0] |" in line for line in shares_markdown(results, WORDS))
    assert factorial_csv(results).count("\n") == 1 + 3 + 2 + 2 + 6 + 6 + 4 + 12
    assert effects_svg(results, WORDS).startswith(b"<?xml")
    nothing = results_of([record(("a", "uniform", "drop"), 2.0)])
    assert grid_of(nothing, "scenes") is None
    assert next(iter(main_effects_markdown(nothing, WORDS))).startswith("Not measured yet")
