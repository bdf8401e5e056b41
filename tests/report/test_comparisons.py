from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvbench.report.cell import parse_cell
from kvbench.report.comparisons import Choices, compare, group_comparisons
from kvbench.report.load import Group, load_results
from kvbench.report.paired import sample_score
from tests.report.synthetic import body


def shifted(by: float, **labels: Any) -> Any:
    record = body(**labels)
    for sample in record["samples"]:
        sample["rougeL_vs_full"] += by
    record["measurements"]["rougeL_vs_full"]["value"] += by
    return parse_cell(record)


def test_a_constant_shift_is_found_exactly() -> None:
    found = compare(shifted(0.1, num_samples=64), shifted(0.0, num_samples=64), "rougeL_vs_full")
    assert found is not None
    assert (found.value, found.low) == pytest.approx((0.1, 0.1), abs=0.1)
    assert found.value == pytest.approx(0.1)
    assert (found.verdict, found.num_samples) == ("better", 64)


def test_equal_answers_are_equivalent_once_there_are_enough() -> None:
    few, many = (shifted(0.0, num_samples=num) for num in (32, 300))
    found = compare(few, few, "rougeL_vs_full")
    assert found is not None
    assert (found.verdict, found.value) == ("undecided", 0.0), "a rare loss would not have been seen"
    assert (found.more_samples or 0) > 100
    found = compare(many, many, "rougeL_vs_full")
    assert found is not None
    assert found.verdict == "equivalent"


def test_unequal_sample_sets_are_compared_only_on_request() -> None:
    one, two = body(), body(policy="elastic")
    one["samples"][0]["rougeL_vs_full"] = None
    found = compare(parse_cell(one), parse_cell(two), "rougeL_vs_full")
    assert found is not None
    assert found.verdict == "not comparable"
    assert "31 samples have a number in both" in found.reason
    found = compare(parse_cell(one), parse_cell(two), "rougeL_vs_full", Choices(intersect=True))
    assert found is not None
    assert found.num_samples == 31


def test_a_margin_can_be_chosen() -> None:
    words = ("rougeL_vs_full", Choices(margins={"rougeL_vs_full": 0.5}))
    found = compare(shifted(0.1), shifted(0.0), *words)
    assert found is not None
    assert (found.verdict, found.margin) == ("equivalent", 0.5)


def test_a_group_is_compared_with_full_and_among_itself(sweep_folder: Path) -> None:
    (group,) = load_results(sweep_folder).groups
    found = group_comparisons(group)
    rouge = [one for one in found if one.measure == "rougeL_vs_full"]
    assert sum(one.second.is_full for one in rouge) == 12
    assert sum(not one.second.is_full for one in rouge) == 3 * 6, "six pairs of policies at each of three budgets"
    assert all(one.first.budget == one.second.budget for one in rouge if not one.second.is_full)
    assert all((one.p_holm or 0) >= (one.p_value or 0) for one in found if one.p_value is not None)
    primary = [one for one in found if one.primary]
    assert {one.measure for one in primary} == {"rougeL_vs_full", "tpot_ratio_to_full"}
    assert {one.first.budget_fraction for one in primary} == {0.2}
    assert not {"length_ratio", "kv_stored_bytes"} & {one.measure for one in found if one.is_clear}
    only = group_comparisons(group, only=["ppl"])
    assert only == tuple(one for one in found if one.measure == "ppl")


def test_holm_takes_back_what_only_many_looks_found() -> None:
    rng = np.random.default_rng(0)
    cells = []
    for number in range(40):
        record = body(policy=f"p{number}", num_samples=40)
        for sample in record["samples"]:
            sample["rougeL_vs_full"] = 0.5 + float(rng.normal(0, 0.1))
        cells.append(parse_cell(record))
    group = Group(model="m", dataset="d", cells=tuple(cells))
    found = group_comparisons(group, only=["rougeL_vs_full"])
    assert sum((one.p_value or 1) < 0.05 for one in found) > 5, "of 780 comparisons of nothing"
    assert not [one for one in found if one.is_clear]
    assert any("Holm" in one.reason for one in found)


def test_times_are_compared_by_their_ratio_to_full() -> None:
    slow, fast = body(), body(policy="elastic")
    for record, value in ((slow, 1.3), (fast, 1.0)):
        entry = {"value": value, "low": value / 1.02, "high": value * 1.02, "n": 6, "unit": "", "method": "t"}
        record["measurements"]["tpot_ratio_to_full"] = entry
    full = parse_cell(body(policy="full", budget=None))
    found = compare(parse_cell(slow), full, "tpot_ratio_to_full")
    assert found is not None
    assert (found.value, found.low, found.high) == pytest.approx((0.3, 1.3 / 1.02 - 1, 1.3 * 1.02 - 1))
    assert found.verdict == "worse"
    same = compare(parse_cell(fast), full, "tpot_ratio_to_full")
    assert same is not None
    assert same.verdict == "equivalent"
    between = compare(parse_cell(slow), parse_cell(fast), "tpot_ratio_to_full")
    assert between is not None
    assert between.value == pytest.approx(0.3)
    assert between.verdict == "worse"
    assert (between.high or 0) - (between.low or 0) > (found.high or 0) - (found.low or 0)


def test_lower_perplexity_is_better_and_is_compared_in_nats() -> None:
    good, bad = parse_cell(body(policy="elastic")), parse_cell(body(policy="streaming_llm"))
    found = compare(good, bad, "ppl")
    assert found is not None
    assert found.verdict == "better"
    assert -1.0 < found.value < 0.0


def test_samples_of_one_picture_stay_together() -> None:
    one, two = body(), body(policy="elastic")
    for record in (one, two):
        for sample in record["samples"]:
            sample["cluster"] = "same"
    found = compare(parse_cell(one), parse_cell(two), "rougeL_vs_full")
    assert found is not None
    assert found.low is None


def test_without_samples_intervals_that_overlap_are_undecided() -> None:
    one, two = body(), body(policy="streaming_llm")
    one["samples"] = two["samples"] = []
    apart = compare(parse_cell(one), parse_cell(two), "rougeL_vs_full")
    same = compare(parse_cell(one), parse_cell(one), "rougeL_vs_full")
    assert apart is not None
    assert same is not None
    assert (apart.verdict, same.verdict) == ("better", "undecided")


def test_times_of_a_noisy_cell_and_of_the_machine_get_no_verdict() -> None:
    quiet, loud = body(), body(policy="elastic")
    loud["measurements"]["reference_drift_fraction"] = {"value": 0.1, "low": None, "high": None, "n": 1, "unit": ""}
    for record, value in ((quiet, 5.0), (loud, 9.0)):
        for name in ("tpot_ms", "full_tpot_ms", "tpot_ratio_to_full"):
            record["measurements"][name] = {"value": value, "low": value - 0.1, "high": value + 0.1, "n": 6, "unit": ""}
    for name in ("tpot_ms", "tpot_ratio_to_full"):
        found = compare(parse_cell(quiet), parse_cell(loud), name)
        assert found is not None
        assert found.verdict == "noisy"
        assert "drifted by 10.0%" in found.reason
    assert compare(parse_cell(quiet), parse_cell(loud), "full_tpot_ms") is None
    once = compare(parse_cell(quiet), parse_cell(loud), "kv_stored_bytes")
    assert once is not None
    assert once.verdict == "not comparable"


def test_a_sample_without_scored_tokens_has_no_score() -> None:
    assert sample_score({"nll_sum": 1.0, "num_scored_tokens": 0}, "ppl") is None
    assert sample_score({"rougeL_vs_full": True}, "rougeL_vs_full") is None
