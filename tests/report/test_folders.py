"""Several results folders read as one."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvbench.errors import ConfigError
from kvbench.report.build import write_report
from kvbench.report.load import folder_names, load_folders, load_results
from tests.report.synthetic import body, write_cell


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
