from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbench.errors import ConfigError
from kvbench.report.build import write_report
from kvbench.report.load import folder_names, load_folders, load_results, natural_key
from kvbench.report.page import render_page
from kvbench.stats.intervals import FEW_METHOD
from tests.report.synthetic import body, write_cell, write_sweep


def test_cells_come_in_table_order_with_full_first(sweep_folder: Path) -> None:
    results = load_results(sweep_folder)
    assert len(results.records) == 13
    assert results.policies == ("full", "elastic", "h2o", "random", "streaming_llm")
    assert [cell.budget_fraction for cell in results.records[:4]] == [None, 0.1, 0.2, 0.5]
    assert not results.problems


def test_an_interval_without_width_of_an_older_record_is_shown_with_its_exact_bound(tmp_path: Path) -> None:
    record, full = body(policy="elastic"), body(policy="full", budget=None)
    for sample in record["samples"]:
        sample |= {"objects_recalled_fraction": 0.0, "kl_sum": 0.0, "num_compared_tokens": 9}
    least = {"value": 0.0, "low": 0.0, "high": 0.0, "n": 32, "method": "constant over clusters"}
    record["measurements"] |= {"objects_recalled_fraction": least, "kl_to_full": least}
    full["measurements"]["rougeL_vs_full"] |= {"value": 1.0, "low": 0.9, "high": 1.0, "method": FEW_METHOD}
    write_cell(tmp_path, record)
    write_cell(tmp_path, full)
    first, second = load_results(tmp_path).records
    recalled, divergence = second.measurements["objects_recalled_fraction"], second.measurements["kl_to_full"]
    assert (recalled.low, recalled.high, recalled.method) == (0.0, pytest.approx(0.109, abs=5e-4), FEW_METHOD)
    assert (divergence.value, divergence.low, divergence.high) == (0.0, None, None), "no scale, so nothing bounds it"
    assert "no interval" in divergence.method
    assert first.measurements["rougeL_vs_full"].low is None, "no sample could say anything else of full"
    page = render_page(load_results(tmp_path), []).replace("&nbsp;", " ")
    assert "[0.0, 10.9]" in page
    assert "[0.0, 0.0]" not in page
    assert FEW_METHOD in page


def with_copy(bandwidth: float, *, gpu: str = "one", **labels: Any) -> dict[str, Any]:
    """Return a cell that reads 3e9 bytes a step, at a launch median of 4 ms."""
    record = body(**labels)
    roof_ms = 3e12 / bandwidth
    record["environment"]["gpu"] = gpu
    record["measurements"] |= {
        "copy_bandwidth_bytes_per_s": {"value": bandwidth, "n": 1},
        "roof_ms": {"value": roof_ms, "n": 1},
        "roof_share_fraction": {"value": roof_ms / 4, "low": roof_ms / 4.1, "high": roof_ms / 3.9, "n": 6},
    }
    return record


def test_cells_of_one_machine_and_sweep_stand_under_one_roof_with_the_spread_of_its_bandwidth(tmp_path: Path) -> None:
    for policy, bandwidth in (("elastic", 3.0e12), ("h2o", 3.1e12), ("random", 1.0e12)):
        write_cell(tmp_path, with_copy(bandwidth, policy=policy))
    write_cell(tmp_path, with_copy(2.0e12, gpu="another", policy="own"))
    write_cell(tmp_path, with_copy(1.5e12, sweep="second", policy="own", budget=0.5))
    cells = {(cell.policy, cell.budget_fraction): cell for cell in load_results(tmp_path).records}
    for policy, own in (("elastic", 3.0e12), ("h2o", 3.1e12), ("random", 1.0e12)):
        cell = cells[policy, 0.2]
        assert cell.own_bandwidth == own
        roof, share = cell.measurements["roof_ms"], cell.measurements["roof_share_fraction"]
        assert (roof.value, roof.low, roof.high, roof.n) == pytest.approx((1.0, 3 / 3.1, 3.0, 3))
        assert (share.value, share.low, share.high) == pytest.approx((0.25, 3 / 3.1 / 4.1, 3 / 3.9))
        assert "median of 3" in roof.method
        assert cell.measurements["copy_bandwidth_bytes_per_s"].value == 3.0e12
    assert cells["own", 0.2].measurements["roof_ms"].value == 1.5
    assert cells["own", 0.5].measurements["roof_ms"].low is None, "one cell shows no spread"


def test_on_a_gpu_the_roof_is_that_of_the_fastest_copy(tmp_path: Path) -> None:
    for policy, bandwidth in (("elastic", 3.0e12), ("h2o", 4.0e12), ("random", 3.0e12)):
        record = with_copy(bandwidth, policy=policy)
        record["environment"]["device"] = "cuda:1"
        write_cell(tmp_path, record)
    for cell in load_results(tmp_path).records:
        roof, share = cell.measurements["roof_ms"], cell.measurements["roof_share_fraction"]
        assert roof.value == pytest.approx(0.75)
        assert (roof.low, roof.high) == (None, None), "the fastest of some has no interval"
        assert (share.value, share.low, share.high) == pytest.approx((0.75 / 4, 0.75 / 4.1, 0.75 / 3.9))
        assert "fastest of 3 cells of the machine and sweep" in roof.method


def test_damaged_and_foreign_files_are_problems_and_cost_nothing_else(tmp_path: Path) -> None:
    write_cell(tmp_path, body())
    torn = write_cell(tmp_path, body(policy="elastic"))
    torn.write_bytes(torn.read_bytes()[:-50])
    foreign = tmp_path / "cells" / "foreign" / "record.json"
    foreign.parent.mkdir()
    foreign.write_text('{"a": 1}')
    nameless = body(policy="random")
    nameless["labels"] = {"model": "m"}
    write_cell(tmp_path, nameless)
    (tmp_path / "cells" / "empty").mkdir()
    results = load_results(tmp_path)
    assert [cell.policy for cell in results.records] == ["h2o"]
    assert len(results.problems) == 3
    assert not any(str(tmp_path) in problem.path for problem in results.problems)


def test_an_unknown_measurement_is_reported_and_the_cell_is_kept(tmp_path: Path) -> None:
    record = body()
    record["measurements"]["tttf_ms"] = {"value": 1.0}
    record["measurements"]["ppl"]["value"] = None
    write_cell(tmp_path, record)
    results = load_results(tmp_path)
    assert results.records[0].estimate("ppl") is None
    assert "ttft_ms" in results.problems[0].message


def test_only_the_wanted_sweep_is_read(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    write_cell(tmp_path, body(policy="oracle", sweep="second"))
    assert [cell.policy for cell in load_results(tmp_path, sweep="second").records] == ["oracle"]
    with pytest.raises(ConfigError, match="did you mean 'second'"):
        load_results(tmp_path, sweep="secnd")


def test_a_missing_folder_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_results(tmp_path / "nowhere")


def test_cells_with_equal_labels_are_told_apart_by_the_setting_that_differs(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_cell(tmp_path, body(policy="random", seed=seed))
    group = load_results(tmp_path).groups[0]
    assert list(group.by_series()) == ["random (policy.seed=0)", "random (policy.seed=1)"]


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ([{"num_samples": 32}, {"num_samples": 256}], {"scenes num_samples=32", "scenes num_samples=256"}),
        (
            [{"ask": {"kind": "describe"}}, {"ask": {"kind": "count"}}],
            {"scenes ask.kind=describe", "scenes ask.kind=count"},
        ),
        ([{"fingerprint": "a" * 64}, {"fingerprint": "b" * 64}], {"scenes #41b0a9", "scenes #fe106a"}),
        ([{"num_samples": 32}, {"num_samples": 32}], {"scenes"}),
    ],
)
def test_data_sets_of_one_name_are_told_apart_by_the_setting_that_differs(
    tmp_path: Path, settings: list[dict[str, Any]], names: set[str]
) -> None:
    for policy, dataset in zip(("h2o", "elastic"), settings, strict=True):
        record = body(policy=policy)
        record["cell"]["dataset"] = dataset
        write_cell(tmp_path, record)
    assert {cell.dataset for cell in load_results(tmp_path).records} == names


def test_a_cell_measured_again_with_fewer_tasks_is_named_by_them_and_full_is_the_one_with_most(tmp_path: Path) -> None:
    for policy, budget in (("full", None), ("h2o", 0.2), ("h2o", 0.5)):
        whole = body(policy=policy, budget=budget)
        whole["cell"]["task"] = {"generation": {"tokens": 8}, "perplexity": {"window": 3}}
        write_cell(tmp_path, whole)
    for policy, budget in (("full", None), ("h2o", 0.2), ("h2o", 0.8)):
        part = body(policy=policy, budget=budget, sweep="second")
        part["cell"]["task"] = {"generation": {"tokens": 8}}
        del part["measurements"]["ppl"]
        write_cell(tmp_path, part)
    (group,) = load_results(tmp_path).groups
    assert [(cell.budget, cell.variant) for cell in group.cells if cell.is_full] == [
        ("-", ""),
        ("-", "tasks=generation"),
    ]
    called = [(cell.budget.removesuffix(" tokens kept"), cell.variant) for cell in group.budgeted]
    assert called == [("20 %", ""), ("50 %", ""), ("80 %", ""), ("20 %", "tasks=generation")]
    assert group.full is not None
    assert group.full.estimate("ppl") is not None


def test_positions_are_named_only_where_they_differ(tmp_path: Path) -> None:
    write_cell(tmp_path, body())
    assert load_results(tmp_path).groups[0].series_label(load_results(tmp_path).records[0]) == "h2o"
    write_cell(tmp_path, body(positions="in_cache"))
    assert list(load_results(tmp_path).groups[0].by_series()) == ["h2o (in_cache)", "h2o (original)"]


def test_a_failed_cell_gives_no_number(tmp_path: Path) -> None:
    record = body()
    record["status"] = "crash"
    write_cell(tmp_path, record)
    assert load_results(tmp_path).records[0].estimate("ppl") is None


def test_odd_values_in_a_record_cost_that_value_only(tmp_path: Path) -> None:
    record = body(num_samples=2)
    record["measurements"]["ppl"] |= {"value": None}
    record["measurements"]["ttft_ms"] |= {"low": "x", "n": None}
    record["samples"][0] |= {"cluster": None, "text": None}
    write_cell(tmp_path, record)
    cell = load_results(tmp_path).records[0]
    ttft = cell.estimate("ttft_ms")
    assert cell.estimate("ppl") is None
    assert ttft is not None
    assert (ttft.low, ttft.n) == (None, None)


def test_intervals_of_older_records_are_cut_to_the_scale(tmp_path: Path) -> None:
    record = body()
    record["measurements"]["rougeL_vs_full"] |= {"value": 0.25, "low": -2.93, "high": 3.43}
    write_cell(tmp_path, record)
    (cell,) = load_results(tmp_path).records
    found = cell.estimate("rougeL_vs_full")
    assert found is not None
    assert found.bounds == (0.0, 1.0)


def test_numbers_inside_names_count_as_numbers() -> None:
    names = ["a", "a 2", "a 10", "a 10b", "a 10b 3", "a 10b 20", "b 1"]
    assert sorted({"b 1", "a 10b 20", "a 2", *names}, key=natural_key) == names


@given(st.lists(st.text(alphabet="0129ab /\u0663", max_size=8), unique=True))
def test_any_names_can_be_ordered_and_no_two_are_alike(names: list[str]) -> None:
    keys = sorted(map(natural_key, names))
    assert all(one < two for one, two in pairwise(keys))


@given(st.integers(0, 10**30), st.integers(0, 10**30))
def test_two_numbers_are_ordered_by_size(one: int, two: int) -> None:
    assert (natural_key(f"test/{one}") < natural_key(f"test/{two}")) == (one < two)


def test_groups_that_differ_in_a_number_stand_by_its_size(tmp_path: Path) -> None:
    for num in (256, 32, 4):
        record = body(num_samples=4, seed=num)
        record["cell"] |= {"dataset": {"name": "scenes", "num_samples": num}}
        write_cell(tmp_path, record)
    names = [group.dataset for group in load_results(tmp_path).groups]
    assert names == ["scenes num_samples=4", "scenes num_samples=32", "scenes num_samples=256"]


def test_one_folder_reads_as_it_always_did(sweep_folder: Path) -> None:
    assert load_folders([sweep_folder]).records == load_results(sweep_folder).records
    assert load_folders([sweep_folder, sweep_folder]).records == load_results(sweep_folder).records


def test_of_equal_cells_the_newest_counts_and_its_folder_is_named(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    write_cell(old, body())
    write_cell(old, body(policy="elastic"))
    write_cell(new, body() | {"started_utc": "2026-11-24T13:00:00+00:00", "duration_s": 1.0})
    results = load_folders([old, new])
    assert [(cell.policy, cell.folder) for cell in results.records] == [("elastic", "old"), ("h2o", "new")]
    (choice,) = results.choices
    assert (choice.folder, [other[0] for other in choice.others]) == ("new", ["old"])
    assert load_folders([new, old]).records == results.records


def test_a_newer_failure_does_not_hide_a_number(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    write_cell(old, body())
    write_cell(new, body(status="oom") | {"started_utc": "2026-11-24T13:00:00+00:00"})
    assert [cell.status for cell in load_folders([old, new]).records] == ["ok"]


def test_folders_are_named_by_the_shortest_end_that_differs() -> None:
    assert folder_names([Path("/a/x/results"), Path("/a/y/results")]) == ["x/results", "y/results"]
    assert folder_names([Path("/a/one"), Path("/b/two")]) == ["one", "two"]
    assert folder_names([Path("/results"), Path("/a/results")]) == ["/results", "a/results"]


def test_problems_and_a_missing_folder_are_named(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    write_cell(one, body())
    write_cell(two, body(policy="elastic")).write_text("{")
    (problem,) = load_folders([one, two]).problems
    assert problem.path.startswith("two/cells/")
    with pytest.raises(ConfigError, match="does not exist"):
        load_folders([one, tmp_path / "three"])


def test_a_damaged_search_is_a_problem_and_costs_nothing_else(tmp_path: Path) -> None:
    write_cell(tmp_path, body())
    (tmp_path / "frontier").mkdir()
    (tmp_path / "frontier" / "mine.json").write_text("{}")
    results = load_folders([tmp_path])
    assert len(results.records) == 1
    assert [problem.path for problem in results.problems] == ["frontier/mine.json"]


def test_a_page_of_two_folders_says_where_each_cell_is_from_and_not_where_they_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvbench.report.build.draw_plots", lambda results: ())
    one, two = tmp_path / "one", tmp_path / "two"
    write_cell(one, body())
    write_cell(two, body() | {"started_utc": "2026-11-24T13:00:00+00:00"})
    page = write_report(load_folders([one, two]), tmp_path / "page", tmp_path / "page").page.read_text(encoding="utf-8")
    assert "taken from <code>two</code>, not from <code>one</code>" in page
    assert str(tmp_path) not in page


def test_groups_with_answers_come_before_those_of_costs_alone_and_say_batch_and_prompt(tmp_path: Path) -> None:
    costs = []
    for batch, tokens in ((16, 1024), (8, 1024), (16, 624)):
        one = body(model="a", dataset=f"synthetic, {tokens} tokens", seed=batch)
        one["cell"]["dataset"] = {"prompt_tokens": tokens, "num_examples": batch}
        one["cell"]["task"] = {"speed": {"batch_size": batch}}
        one["samples"] = []
        costs.append(one)
    for one in (*costs, body(model="b")):
        write_cell(tmp_path, one)
    assert [group.title for group in load_results(tmp_path).groups] == [
        "b on scenes",
        "a on synthetic, batch 8, 1,024 prompt tokens",
        "a on synthetic, batch 16, 624 prompt tokens",
        "a on synthetic, batch 16, 1,024 prompt tokens",
    ]


def test_tasks_that_share_nothing_and_a_hidden_question_are_groups_of_their_own(tmp_path: Path) -> None:
    cases: list[dict[str, Any]] = [{"task": {"perplexity": {}}}, {"task": {"generation": {}}}]
    cases += [{"task": {"generation": {}}, "query_visible": False}]
    for number, settings in enumerate(cases):
        for policy, budget in (("full", None), ("h2o", 0.2)):
            record = body(policy=policy, budget=budget, seed=number)
            record["cell"] |= settings
            write_cell(tmp_path, record)
    results = load_results(tmp_path)
    assert [group.title for group in results.groups] == [
        "tiny-llava on scenes, generation",
        "tiny-llava on scenes, generation, question hidden",
        "tiny-llava on scenes, perplexity",
    ]
    assert all(list(group.by_series()) == ["full", "h2o"] for group in results.groups)
