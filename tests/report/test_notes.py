from __future__ import annotations

from pathlib import Path
from typing import Any

from kvbench.report.findings import below_random, not_monotone
from kvbench.report.load import Group, load_results
from kvbench.report.notes import notes_of
from tests.report.synthetic import body, write_cell, write_sweep


def group_of(folder: Path, *records: dict[str, Any]) -> Group:
    for record in records:
        write_cell(folder, record)
    return load_results(folder).groups[0]


def text_of(group: Group) -> str:
    return "\n".join("\n".join((note.text, *note.details)) for note in notes_of(group))


def test_policies_below_random_are_named_with_a_reason_that_the_numbers_bear_out(sweep_folder: Path) -> None:
    group = load_results(sweep_folder).groups[0]
    assert list(below_random(group)) == ["streaming_llm"]
    text = text_of(group)
    assert "`random` is not the worst policy: `streaming_llm`" in text
    assert "drops the picture" in text
    assert "objects recalled agree" in text


def test_the_reason_is_called_unchecked_where_objects_were_not_counted(tmp_path: Path) -> None:
    records = [body(policy="random"), body(policy="streaming_llm")]
    for record in records:
        del record["measurements"]["objects_recalled_fraction"]
    assert "can not tell" in text_of(group_of(tmp_path, *records))


def test_scores_below_random_that_may_be_chance_are_called_so(tmp_path: Path) -> None:
    twin, other = body(policy="random"), body(policy="elastic")
    other["samples"], other["measurements"] = twin["samples"], dict(twin["measurements"])
    other["measurements"]["ppl"] = other["measurements"]["ppl"] | {"value": 99.0}
    text = text_of(group_of(tmp_path, twin, other))
    assert "`random` scores above `elastic` somewhere" in text
    assert "may be chance" in text


def test_random_at_the_bottom_is_said_too(tmp_path: Path) -> None:
    assert "as it should be" in text_of(group_of(tmp_path, body(policy="random"), body(policy="elastic")))


def test_quality_that_rises_as_the_budget_falls_is_flagged(tmp_path: Path) -> None:
    small, large = body(policy="h2o", budget=0.1), body(policy="h2o", budget=0.5)
    small["samples"], large["samples"] = large["samples"], small["samples"]
    small["measurements"], large["measurements"] = large["measurements"], small["measurements"]
    group = group_of(tmp_path, small, large)
    assert {contrast.name for contrast in not_monotone(group)} >= {"ppl", "rougeL_vs_full"}
    assert "clearly worse where the budget grows" in text_of(group)


def test_failures_few_samples_and_unequal_machines_are_noted(tmp_path: Path) -> None:
    other = body(policy="elastic", num_samples=4)
    other["environment"]["device"] = "cuda"
    text = text_of(group_of(tmp_path, body(), other, body(policy="random", status="timeout")))
    for wanted in ("1 of 3 cells failed", "timeout in decode", "only 4 samples", "device: cpu, cuda", "not measured"):
        assert wanted in text


def test_full_alone_needs_no_policy(tmp_path: Path) -> None:
    write_sweep(tmp_path / "a")
    group = group_of(tmp_path / "b", body(policy="full", budget=None))
    assert notes_of(group) == []
