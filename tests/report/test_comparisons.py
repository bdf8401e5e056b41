from __future__ import annotations

from typing import Any

import pytest

from kvbench.report.cell import parse_cell
from kvbench.report.comparisons import compare
from kvbench.report.paired import sample_score
from tests.report.synthetic import body


def shifted(by: float, **labels: Any) -> Any:
    record = body(**labels)
    for sample in record["samples"]:
        sample["rougeL_vs_full"] += by
    record["measurements"]["rougeL_vs_full"]["value"] += by
    return parse_cell(record)


def test_a_constant_shift_is_found_exactly() -> None:
    found = compare(shifted(0.1), shifted(0.0), "rougeL_vs_full")
    assert found is not None
    assert (found.value, found.low) == pytest.approx((0.1, 0.1), abs=0.1)
    assert found.value == pytest.approx(0.1)
    assert (found.verdict, found.num_samples) == ("better", 32)


def test_equal_cells_are_equivalent() -> None:
    found = compare(shifted(0.0), shifted(0.0), "rougeL_vs_full")
    assert found is not None
    assert (found.verdict, found.value) == ("equivalent", 0.0)


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


def test_a_sample_without_scored_tokens_has_no_score() -> None:
    assert sample_score({"nll_sum": 1.0, "num_scored_tokens": 0}, "ppl") is None
    assert sample_score({"rougeL_vs_full": True}, "rougeL_vs_full") is None
