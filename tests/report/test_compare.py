from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvbench.report.compare import (
    DECLARED,
    Choices,
    Comparison,
    compare,
    declared_budget,
    difference_interval,
    difference_text,
    group_comparisons,
    judged,
    p_text,
    size_with_unit,
    timing_noise,
    verdict_remark,
)
from kvbench.report.load import Group, load_results, parse_cell, sample_score
from kvbench.report.standing import asked_budget, judge, swapped
from kvbench.report.tables import verdict_rows
from kvbench.stats.tests import holm, more_samples
from tests.report.synthetic import body, without_facts, write_cell


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


def test_what_only_holm_leaves_undecided_asks_for_as_many_samples_as_its_family_needs() -> None:
    """0.02 at a standard error of 0.009: 2.2 standard errors, clear alone and not among twelve."""
    cell = parse_cell(body())
    one = Comparison(
        measure="objects_recalled_fraction", first=cell, second=cell, verdict="undecided", method="", value=0.02,
        low=0.0024, high=0.0376, p_value=0.027, num_samples=500, minimum_detectable=0.0252,
    )  # fmt: skip
    assert judged(one).verdict == "better"
    found = judged(one, 0.32, 12)
    assert (found.verdict, found.more_samples) == ("undecided", more_samples(0.02, 0.0252, 500, None, num_compared=12))
    assert (found.more_samples or 0) > 2 * (more_samples(0.02, 0.0252, 500, None) or 0)
    assert judged(one, 0.054, 2).more_samples == more_samples(0.02, 0.0252, 500, None, num_compared=2)


def test_a_family_is_corrected_by_rank_whatever_its_order(tmp_path: Path) -> None:
    for policy, budget in (("full", None), ("h2o", 0.2), ("elastic", 0.2), ("random", 0.2)):
        write_cell(tmp_path, body(policy=policy, budget=budget))
    found = group_comparisons(load_results(tmp_path).groups[0], only=["rougeL_vs_full"], between=False)
    p_values = [one.p_value or 0.0 for one in found]
    assert len(p_values) == 3
    assert [one.p_holm for one in found] == holm(p_values)


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
    assert {one.measure for one in primary} == {"objects_recalled_fraction", "tpot_ratio_to_full"}
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


@pytest.mark.parametrize(("name", "value"), [("gpu", "another GPU"), ("cpu_model", "other cores"), ("shard", "2/2")])
def test_times_of_two_machines_or_shards_do_not_compare_and_each_to_its_own_full_cache_does(
    name: str, value: str
) -> None:
    mine, other = with_measure(body(), "tpot_ratio_to_full", 1.0), body(policy="elastic")
    with_measure(other, "tpot_ratio_to_full", 3.0)
    near = compare(parse_cell(other), parse_cell(mine), "tpot_ratio_to_full")
    other["environment"][name] = value
    far = compare(parse_cell(other), parse_cell(mine), "tpot_ratio_to_full")
    own = compare(parse_cell(other), parse_cell(body(policy="full", budget=None)), "tpot_ratio_to_full")
    assert near is not None
    assert far is not None
    assert own is not None
    assert (near.verdict, far.verdict, own.verdict) == ("worse", "noisy", "worse")
    assert "do not compare: " in far.reason
    assert value in far.reason


def with_measure(record: Any, name: str, value: float, half: float | None = 0.1, n: int = 6) -> Any:
    low, high = (None, None) if half is None else (value - half, value + half)
    record["measurements"][name] = {"value": value, "low": low, "high": high, "n": n, "unit": "", "method": "t"}
    return record


def verdict(one: Any, two: Any, name: str, choices: Choices = DECLARED) -> Comparison:
    found = compare(parse_cell(one), parse_cell(two), name, choices)
    assert found is not None
    return found


def test_samples_without_a_common_id_get_no_verdict() -> None:
    one, two = body(), body(policy="streaming_llm")
    for sample in one["samples"]:
        sample["id"] += "/other"
    for choices in (Choices(), Choices(intersect=True)):
        found = verdict(one, two, "rougeL_vs_full", choices)
        assert (found.verdict, found.low) == ("not comparable", None)
        assert found.reason == "0 samples have a number in both, of 32 and 32"
    one["samples"] = []
    assert verdict(one, two, "rougeL_vs_full").verdict == "not comparable"


def test_perplexities_that_cannot_be_paired_differ_in_nats_too() -> None:
    one, two = body(), body(policy="streaming_llm")
    ratio = one["measurements"]["ppl"]["value"] / two["measurements"]["ppl"]["value"]
    one["samples"] = one["samples"][:10]
    found = verdict(one, two, "ppl")
    assert found.verdict == "not comparable"
    assert found.value == pytest.approx(math.log(ratio))
    one["samples"] = two["samples"] = []
    for record, value in ((one, 2.0), (two, 2.01)):
        with_measure(record, "ppl", value, 0.005, 32)
    found = verdict(one, two, "ppl")
    assert (found.low, found.high) == pytest.approx((math.log(1.995 / 2.015), math.log(2.005 / 2.005)))
    assert (found.verdict, found.margin) == ("equivalent", 0.02), "the margin is declared in nats"
    assert compare(parse_cell(with_measure(one, "ppl", 0.0)), parse_cell(two), "ppl") is None


def test_perplexity_of_the_released_loop_is_paired() -> None:
    one, two = body(policy="elastic"), body(policy="streaming_llm")
    for record in (one, two):
        with_measure(record, "ppl_released", record["measurements"]["ppl"]["value"], None)
        for sample in record["samples"]:
            sample["released_nll_sum"] = sample["nll_sum"]
            sample["released_num_scored_tokens"] = sample["num_scored_tokens"]
    found, plain = verdict(one, two, "ppl_released"), verdict(one, two, "ppl")
    assert (found.value, found.low, found.num_samples) == (plain.value, plain.low, 32)
    assert found.verdict == "better"


def conversation(policy: str, budget: float | None) -> Any:
    record = body(policy=policy, budget=budget)
    record["measurements"] = {}
    for turn in (1, 2):
        for sample in record["samples"]:
            sample[f"turn{turn}_rougeL_vs_full"] = sample["rougeL_vs_full"]
        with_measure(record, f"turn{turn}_rougeL_vs_full", 1.0 if budget is None else 0.6)
    for sample in record["samples"]:
        for name in ("rougeL_vs_full", "rougeL_vs_reference", "objects_recalled_fraction", "nll_sum"):
            del sample[name]
    return record


def test_a_conversation_is_judged_by_its_turns(tmp_path: Path) -> None:
    for policy, budget in (("full", None), ("streaming_llm", 0.2)):
        write_cell(tmp_path, conversation(policy, budget))
    (group,) = load_results(tmp_path).groups
    found = judge(group)
    assert found.qualities == ("turn1_rougeL_vs_full", "turn2_rougeL_vs_full")
    for name in found.qualities:
        against = found.against_full(group.budgeted[0], name)
        assert against is not None
        assert against.verdict == "worse"
    assert [row.measure for row in verdict_rows(group)] == ["turn1_rougeL_vs_full"]
    assert [one.measure for one in group_comparisons(group) if one.primary] == ["turn1_rougeL_vs_full"]


def test_one_budget_is_primary_as_declared_even_where_cells_fail(tmp_path: Path) -> None:
    write_cell(tmp_path, body(policy="full", budget=None))
    for share in (0.1, 0.3, 0.5):
        for policy in ("h2o", "elastic"):
            write_cell(tmp_path, body(policy=policy, budget=share, status="oom" if share == 0.1 else "ok"))
    (group,) = load_results(tmp_path).groups
    budgets = {one.first.budget for one in group_comparisons(group) if one.primary}
    assert budgets == {"30 % tokens kept"} == {declared_budget(group)} == {asked_budget(judge(group))}


def test_the_middle_one_of_absolute_budgets_is_primary(tmp_path: Path) -> None:
    write_cell(tmp_path, body(policy="full", budget=None))
    for tokens in (16, 32, 64):
        record = body(seed=tokens)
        record["labels"] |= {"budget": f"{tokens} tokens", "budget_fraction": None, "budget_tokens": tokens}
        write_cell(tmp_path, record)
    (group,) = load_results(tmp_path).groups
    assert {one.first.budget for one in group_comparisons(group) if one.primary} == {"32 tokens"}


def test_a_ratio_of_times_turns_round_to_its_inverse() -> None:
    slow, fast = (with_measure(body(policy=name), "tpot_ratio_to_full", value, value / 50) for name, value in
                  (("h2o", 1.225), ("elastic", 1.0)))  # fmt: skip
    found = verdict(slow, fast, "tpot_ratio_to_full")
    turned, direct = swapped(found), verdict(fast, slow, "tpot_ratio_to_full")
    assert (turned.value, turned.low, turned.high) == pytest.approx((direct.value, direct.low, direct.high))
    assert turned.value == pytest.approx(1 / 1.225 - 1)
    assert (turned.verdict, direct.verdict) == ("better", "better")
    score = verdict(body(policy="elastic"), body(), "ppl")
    assert (swapped(score).value, swapped(score).low) == (-score.value, -(score.high or 0))


def test_holm_is_blamed_only_for_what_it_took_back() -> None:
    one, full = body(num_samples=2), body(policy="full", budget=None, num_samples=2)
    for sample in one["samples"]:
        sample["rougeL_vs_full"] = 0.5
    found = verdict(one, full, "rougeL_vs_full")
    assert (found.verdict, found.p_value, (found.high or 0) < 0) == ("undecided", 0.5, True)
    assert found.reason == "too few clusters differ (p = 0.5)"


@pytest.mark.parametrize(
    ("name", "spread", "noisy"),
    [
        ("roof_share_fraction", "tpot", True),
        ("tpot_ratio_to_full", "tpot", True),
        ("tpot_ms", "ttft", False),
        ("full_ttft_ms", "ttft", True),
        ("throughput_tokens_per_s", "ttft", True),
        ("throughput_ratio_to_full", "tpot", True),
        ("capacity_throughput_ratio_to_full", "ttft", True),
        ("capacity_ratio_to_full", "tpot", False),
        ("ppl", "tpot", False),
    ],
)
def test_a_time_or_rate_is_noisy_by_the_launches_it_is_made_of(name: str, spread: str, noisy: bool) -> None:
    cell = parse_cell(with_measure(body(), f"{spread}_spread_fraction", 0.2, None, 1))
    assert bool(timing_noise(cell, name)) == noisy


def test_a_share_of_the_roof_gets_no_verdict_from_a_restless_machine() -> None:
    loud, quiet = body(policy="elastic"), body()
    with_measure(loud, "tpot_spread_fraction", 0.2, None, 1)
    found = verdict(with_measure(loud, "roof_share_fraction", 0.5, 0.01), quiet, "roof_share_fraction")
    assert found.verdict == "noisy"


def test_numbers_measured_apart_have_a_p_value_that_holm_corrects(tmp_path: Path) -> None:
    write_cell(tmp_path, with_measure(body(policy="full", budget=None), "tpot_ms", 10.0, 0.4))
    for number in range(30):
        write_cell(tmp_path, with_measure(body(policy=f"p{number}"), "tpot_ms", 10.85, 0.4))
    (group,) = load_results(tmp_path).groups
    found = list(group_comparisons(group, only=["tpot_ms"], between=False))
    assert len(found) == 30
    assert all((one.low or 0) > 0 and 0 < (one.p_value or 0) < 0.05 for one in found), "intervals are apart"
    assert all(one.p_holm == pytest.approx(30 * (one.p_value or 0)) for one in found)
    assert {one.verdict for one in found} == {"undecided"}
    assert compare(found[0].first, found[0].second, "tpot_ms").verdict == "worse"  # type: ignore[union-attr]


@pytest.mark.parametrize("odd", [10**400, -(10**400), 1e308, 1e99, float("inf")], ids=lambda odd: f"{odd!s:.5}")
def test_a_score_that_no_run_writes_is_no_traceback(odd: float) -> None:
    one, two = body(), body(policy="elastic")
    for sample in one["samples"][:3]:
        sample["rougeL_vs_full"] = odd
    assert sample_score({"rougeL_vs_full": 10**400}, "rougeL_vs_full") is None
    found = verdict(one, two, "rougeL_vs_full", Choices(intersect=True))
    assert found.num_samples == (32 if odd == 1e99 else 29)
    for sample in one["samples"]:
        sample["rougeL_vs_full"] = 5.0
    found = verdict(one, body(policy="full", budget=None), "rougeL_vs_full")
    assert (found.low or 0) <= found.value <= (found.high or 0)


@pytest.mark.parametrize("quality", ["objects_recalled_fraction", "rougeL_vs_full", "ppl"])
def test_the_terminal_says_differences_in_the_words_of_the_other_formats(tmp_path: Path, quality: str) -> None:
    for policy, budget in (("full", None), ("h2o", 0.2), ("elastic", 0.2), ("elastic", 0.5)):
        record = body(policy=policy, budget=budget)
        record = record if quality.startswith("objects") else without_facts(record)
        if quality == "ppl":
            del record["measurements"]["rougeL_vs_full"]
        write_cell(tmp_path, record)
    (group,) = load_results(tmp_path).groups
    judged = judge(group)
    rows = verdict_rows(group)
    assert {row.measure for row in rows} == {quality, "tpot_ratio_to_full"}
    for row in rows:
        (cell,) = (c for c in group.budgeted if (group.series_label(c), c.budget) == (row.policy, row.budget))
        one = judged.against_full(cell, row.measure)
        assert one is not None
        assert row.interval == difference_interval(one)
        assert sorted(f"{row.difference} {row.interval}".split()) == sorted(difference_text(one).split())
        assert verdict_remark(one) in row.verdict or one.verdict not in ("equivalent", "undecided")


def test_a_sample_without_scored_tokens_has_no_score() -> None:
    assert sample_score({"nll_sum": 1.0, "num_scored_tokens": 0}, "ppl") is None
    assert sample_score({"rougeL_vs_full": True}, "rougeL_vs_full") is None


def test_a_size_has_its_unit_wherever_a_margin_is_named() -> None:
    assert size_with_unit("rougeL_vs_full", 0.02) == "0.020"
    assert size_with_unit("objects_recalled_fraction", 0.02) == "2.0 points"
    assert size_with_unit("ppl", 0.02) == "0.020 nats/token"
    assert size_with_unit("tpot_ratio_to_full", 0.03) == "3.0 %"
    assert size_with_unit("ppl", None) == ""


def test_a_p_value_is_rounded_to_what_it_can_say() -> None:
    assert [p_text(value) for value in (None, 0.0, 0.00099, 0.0123, 1.0)] == [
        *("", "p < 0.001", "p < 0.001", "p = 0.012", "p = 1"),
    ]
