"""Where policies fail, and the answers behind it: counts are of what a policy has, every link leads to its answer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from kvbench.report.answer import failures_html
from kvbench.report.load import load_results
from kvbench.report.page import render_page
from kvbench.report.standing import judge
from tests.report.synthetic import body, embedded, without_facts, write_cell


def cell(folder: Path, policy: str, num_samples: int, *, lost: int = 0, budget: float | None = 0.2) -> None:
    """Write a cell of which the last `lost` samples collapse."""
    record = without_facts(body(policy=policy, budget=budget, num_samples=num_samples))
    for index, sample in enumerate(record["samples"]):
        sample["rougeL_vs_full"] = 0.1 if index >= num_samples - lost else 0.9
    write_cell(folder, record)


def failures_of(folder: Path) -> str:
    (group,) = load_results(folder).groups
    return failures_html(judge(group))


def cells_of(page: str) -> list[dict[str, Any]]:
    return list(embedded(page, "sample-data")[0]["cells"])


def test_each_policy_is_counted_over_the_samples_that_it_has(tmp_path: Path) -> None:
    cell(tmp_path, "full", 8, budget=None)
    cell(tmp_path, "h2o", 8, lost=2)
    cell(tmp_path, "elastic", 5, lost=1)
    record = without_facts(body(policy="random", num_samples=8))
    for sample in record["samples"]:
        del sample["rougeL_vs_full"]
    write_cell(tmp_path, record)
    text = failures_of(tmp_path)
    assert (
        "<code>elastic</code> collapses on 1 of 5, <code>h2o</code> collapses on 2 of 8, "
        "<code>random</code> has no scores<"
    ) in text
    assert "o sample collapses under every policy that has it; 5 of 8 under none." in text
    cell(tmp_path, "elastic", 5, lost=1, budget=0.5)
    cell(tmp_path, "h2o", 5, lost=1, budget=0.5)
    text = failures_of(tmp_path)
    assert "<code>elastic</code> collapses on 1, <code>h2o</code> collapses on 1 of 5 samples" in text
    assert "1 collapse under all 2 policies" in text


def test_equal_losses_stand_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    cell(tmp_path, "full", 12, budget=None)
    cell(tmp_path, "h2o", 12)
    rows = re.findall(r'<th scope=row class=name data-v="(\d+)">', failures_of(tmp_path))
    assert rows == [str(number) for number in range(12)]


def test_of_many_policies_the_fewest_and_the_most_collapses_are_named(tmp_path: Path) -> None:
    cell(tmp_path, "full", 8, budget=None)
    for number in range(9):
        cell(tmp_path, f"policy{number}", 8, lost=min(number, 7))
    text = failures_of(tmp_path)
    assert (
        "9 policies collapse on 0 (<code>policy0</code>) to 7 (<code>policy7</code> and <code>policy8</code>) "
        "of 8 samples</summary>" in text
    )
    assert "<code>policy3</code>" not in text.partition("</summary>")[0]


def test_linked_and_collapsed_samples_are_on_a_page_that_can_not_hold_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell(tmp_path, "full", 60, budget=None)
    cell(tmp_path, "h2o", 60, lost=40)
    monkeypatch.setattr("kvbench.report.samples._MOST_SAMPLES", 68)
    page = render_page(load_results(tmp_path), [])
    links = set(re.findall(r'<tr data-sample="([^"]+)">', page))
    assert len(links) == 32, "the worst, and no other"
    found = next(one for one in cells_of(page) if one["policy"] == "h2o")
    held = [answer["id"] for answer in found["samples"]]
    assert links <= set(held)
    assert len(held) == 34, "half of the room"
    assert all(answer.get("collapsed") for answer in found["samples"])
    assert held == sorted(held, key=lambda name: int(name.rpartition("/")[2]))
    assert (found["num"], found["num_collapsed"]) == (60, 40)
    assert "About 34 answers of each cell" in page
