"""The words on top of the page: never more certain than the verdicts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from kvbench.report.answer import answer_html, answer_sentences
from kvbench.report.compare import Choices
from kvbench.report.load import load_results
from kvbench.report.standing import Judged, judge, standing_at
from tests.report.synthetic import body, write_cell, write_sweep


def judged_of(folder: Path) -> Judged:
    (group,) = load_results(folder).groups
    return judge(group)


def cell(folder: Path, policy: str, score: float, *, spread: float = 0.05, **more: Any) -> None:
    """Write a cell whose ROUGE-L lies around `score`, differently on every sample."""
    record = body(policy=policy, num_samples=24, **more)
    for index, sample in enumerate(record["samples"]):
        sample["rougeL_vs_full"] = min(1.0, max(0.0, score + spread * (((index * 7919) % 23) / 11 - 1)))
    values = [sample["rougeL_vs_full"] for sample in record["samples"]]
    record["measurements"]["rougeL_vs_full"] |= {"value": sum(values) / len(values), "low": None, "high": None}
    write_cell(folder, record)


def full(folder: Path) -> None:
    cell(folder, "full", 1.0, spread=0.0, budget=None)


def text_of(judged: Judged) -> str:
    return " ".join(answer_sentences(judged))


def test_a_policy_that_beats_all_others_is_recommended_with_its_loss(tmp_path: Path) -> None:
    full(tmp_path)
    for policy, score in (("h2o", 0.8), ("elastic", 0.5), ("random", 0.2)):
        cell(tmp_path, policy, score)
    text = text_of(judged_of(tmp_path))
    assert "At 20 % of seen take `h2o`" in text
    assert "better than each of the 2 other policies" in text
    assert re.search(r"worse than the full cache \(-0\.2\d\d \[", text)
    assert "No policy is shown to keep" in text


def test_rivals_that_are_not_beaten_are_named_and_nothing_is_recommended(tmp_path: Path) -> None:
    full(tmp_path)
    record_noise = {"h2o": 0.600, "elastic": 0.599, "random": 0.1}
    for index, (policy, score) in enumerate(record_noise.items()):
        record = body(policy=policy, num_samples=24)
        for at, sample in enumerate(record["samples"]):
            sample["rougeL_vs_full"] = score + 0.09 * (((at * (index + 3) * 31) % 19) / 9 - 1)
        values = [sample["rougeL_vs_full"] for sample in record["samples"]]
        record["measurements"]["rougeL_vs_full"]["value"] = sum(values) / len(values)
        write_cell(tmp_path, record)
    judged = judged_of(tmp_path)
    text = text_of(judged)
    assert "take" not in text
    assert "the samples do not decide between" in text
    assert "`h2o`" in text
    assert "`elastic`" in text
    assert "more samples" in answer_html(judged)
    standing = standing_at(judged, judged.group.by_budget["20 % of seen"], "rougeL_vs_full")
    assert standing is not None
    assert [one.policy for one in standing.beaten] == ["random"]
    assert len(standing.rivals) == 1


def test_a_policy_inside_the_margin_is_called_equivalent_and_its_budget_the_smallest(tmp_path: Path) -> None:
    full(tmp_path)
    cell(tmp_path, "h2o", 0.995, spread=0.004)
    cell(tmp_path, "h2o", 0.7, budget=0.1)
    cell(tmp_path, "random", 0.3)
    text = text_of(judged_of(tmp_path))
    assert "equivalent to the full cache" in text
    assert "within 0.020" in text
    assert text.endswith("shown to be kept (margin 0.020): 20 % of seen, with `h2o`.")


def test_another_measure_that_clearly_prefers_another_policy_is_said_in_the_headline(tmp_path: Path) -> None:
    full(tmp_path)
    cell(tmp_path, "h2o", 0.8)
    record = body(policy="elastic", num_samples=24)
    for sample in record["samples"]:
        sample |= {"rougeL_vs_full": 0.3, "objects_recalled_fraction": 0.99}
    record["measurements"]["rougeL_vs_full"]["value"] = 0.3
    record["measurements"]["objects_recalled_fraction"]["value"] = 0.99
    write_cell(tmp_path, record)
    text = text_of(judged_of(tmp_path))
    assert "take `h2o`" in text
    assert "But in objects recalled `elastic` is better" in text


def test_without_a_full_cache_nothing_is_said_about_keeping_its_quality(tmp_path: Path) -> None:
    cell(tmp_path, "h2o", 0.8)
    cell(tmp_path, "random", 0.2)
    text = text_of(judged_of(tmp_path))
    assert "Its distance to the full cache was not measured." in text
    assert "Without a usable cell of the full cache" in text


def test_failed_cells_are_named_and_left_out(tmp_path: Path) -> None:
    full(tmp_path)
    cell(tmp_path, "h2o", 0.8)
    write_cell(tmp_path, body(policy="elastic", status="oom"))
    judged = judged_of(tmp_path)
    standing = standing_at(judged, judged.group.by_budget["20 % of seen"], "rougeL_vs_full")
    assert standing is not None
    assert [one.policy for one in standing.ranked] == ["h2o"]
    assert [one.status for one in standing.left_out] == ["oom"]
    assert "Not ranked: <code>elastic</code> (oom)." in answer_html(judged)


def test_only_failed_cells_give_no_recommendation(tmp_path: Path) -> None:
    full(tmp_path)
    write_cell(tmp_path, body(policy="elastic", status="oom"))
    assert "no policy can be recommended" in text_of(judged_of(tmp_path))
    assert "Nothing can be ranked here (oom)." in answer_html(judged_of(tmp_path))


def test_every_budget_of_a_sweep_has_a_block_with_the_four_answers(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    drawn = answer_html(judged_of(tmp_path))
    assert drawn.count("<dt>How sure</dt>") == 3
    for name in ("Quality", "Time", "Memory", "Fails on"):
        assert drawn.count(f"<dt>{name}</dt>") == 3
    assert "data-sample=" in drawn


def test_a_tie_is_not_called_a_win(tmp_path: Path) -> None:
    full(tmp_path)
    twin, other = body(policy="h2o"), body(policy="elastic")
    other["samples"], other["measurements"] = twin["samples"], twin["measurements"]
    write_cell(tmp_path, twin)
    write_cell(tmp_path, other)
    (group,) = load_results(tmp_path).groups
    text = text_of(judge(group))
    assert "do not decide between `elastic`" in text
    assert "and `h2o`" in text
    assert "better than" not in text
    wide = text_of(judge(group, Choices(margins={"rougeL_vs_full": 0.2})))
    assert "take `elastic`" in wide
    assert "or `h2o`: equivalent within the margin." in wide


def test_a_group_without_quality_or_without_budgets_says_so(tmp_path: Path) -> None:
    record = body()
    record["measurements"], record["samples"] = {}, []
    write_cell(tmp_path / "a", record)
    full(tmp_path / "b")
    for name in ("a", "b"):
        assert "no policy can be recommended" in text_of(judged_of(tmp_path / name))
