"""The words on top of the page: never more certain than the verdicts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from kvbench.report.answer import answer_html, answer_sentences
from kvbench.report.compare import Choices
from kvbench.report.load import load_results
from kvbench.report.page import render_page
from kvbench.report.standing import Judged, is_usable, judge, safe_cells, standing_at
from tests.report.synthetic import body, without_facts, write_cell, write_sweep


def judged_of(folder: Path) -> Judged:
    (group,) = load_results(folder).groups
    return judge(group)


def cell(folder: Path, policy: str, score: float, *, spread: float = 0.05, **more: Any) -> None:
    """Write a cell whose ROUGE-L lies around `score`, differently on every sample."""
    record = without_facts(body(policy=policy, num_samples=24, **more))
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
    assert "At 20 % tokens kept take `h2o`" in text
    assert "better than each of the 2 other policies" in text
    assert re.search(r"worse than the full cache \(-0\.2\d\d \[", text)
    assert "No policy is shown to keep" in text


def test_rivals_that_are_not_beaten_are_named_and_nothing_is_recommended(tmp_path: Path) -> None:
    full(tmp_path)
    record_noise = {"h2o": 0.600, "elastic": 0.599, "random": 0.1}
    for index, (policy, score) in enumerate(record_noise.items()):
        record = without_facts(body(policy=policy, num_samples=24))
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
    standing = standing_at(judged, judged.group.by_budget["20 % tokens kept"], "rougeL_vs_full")
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
    assert text.endswith("shown to be kept (margin 0.020): 20 % tokens kept, with `h2o`.")


def test_another_measure_that_clearly_prefers_another_policy_is_said_in_the_headline(tmp_path: Path) -> None:
    full(tmp_path)
    cell(tmp_path, "h2o", 0.8)
    record = without_facts(body(policy="elastic", num_samples=24))
    for sample in record["samples"]:
        sample |= {"rougeL_vs_full": 0.3, "rougeL_vs_reference": 0.99}
    record["measurements"]["rougeL_vs_full"]["value"] = 0.3
    record["measurements"]["rougeL_vs_reference"]["value"] = 0.99
    write_cell(tmp_path, record)
    text = text_of(judged_of(tmp_path))
    assert "take `h2o`" in text
    assert " But in " in text
    assert "in ROUGE-L vs reference `elastic` is better" in text


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
    standing = standing_at(judged, judged.group.by_budget["20 % tokens kept"], "rougeL_vs_full")
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
    twin, other = without_facts(body(policy="h2o")), without_facts(body(policy="elastic"))
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


def recalls(folder: Path, policy: str, share: float, *, rouge: float = 0.7, **more: Any) -> None:
    """Write a cell that recalls `share` of the objects of every picture."""
    record = body(policy=policy, num_samples=24, **more)
    for sample in record["samples"]:
        sample |= {"objects_recalled_fraction": share, "rougeL_vs_full": rouge}
    for name, value in (("objects_recalled_fraction", share), ("rougeL_vs_full", rouge)):
        record["measurements"][name] |= {"value": value, "low": value, "high": value}
    write_cell(folder, record)


def test_what_the_task_asks_for_leads_and_rouge_stands_behind_it_with_its_length(tmp_path: Path) -> None:
    recalls(tmp_path, "full", 0.99, rouge=1.0, budget=None)
    recalls(tmp_path, "h2o", 0.6, rouge=0.95)
    recalls(tmp_path, "elastic", 0.9, rouge=0.8)
    judged = judged_of(tmp_path)
    assert judged.primary == "objects_recalled_fraction"
    assert "At 20 % tokens kept take `elastic`: objects recalled 90.0 %" in text_of(judged)
    drawn = answer_html(judged)
    assert re.search(r"ROUGE-L vs full 0\.800 \[\S+\], length / full 0\.97x", drawn)
    assert "ROUGE-L vs full <code>h2o</code> has the better value" in drawn


def test_where_no_policy_is_usable_the_answer_says_so_and_counts_the_collapses(tmp_path: Path) -> None:
    recalls(tmp_path, "full", 0.98, rouge=1.0, budget=None)
    recalls(tmp_path, "h2o", 0.03, rouge=0.9)
    recalls(tmp_path, "random", 0.0)
    judged = judged_of(tmp_path)
    (text,) = answer_sentences(judged)
    assert re.sub(r" \[[^]]*\]", "", text) == (
        "No policy is usable at 20 % tokens kept: best objects recalled 3.0 % (`h2o`), where the full cache reaches "
        "98.0 %; usable is at least 50 % of the full cache's score. `h2o` collapses on 24 of 24 samples."
    )
    assert "no policy is usable; best value with <code>h2o</code>" in answer_html(judged)
    recalls(tmp_path, "h2o", 0.1, budget=0.3)
    assert "None is usable at any other budget measured: best objects recalled 10.0 %" in text_of(judged_of(tmp_path))
    recalls(tmp_path, "h2o", 0.7, budget=0.5)
    text = text_of(judged_of(tmp_path))
    assert (
        "Smallest budget measured at which a policy is usable: 50 % tokens kept, best objects recalled 70.0 %" in text
    )
    assert "No policy is shown to keep the full cache's objects recalled" in text


@pytest.mark.parametrize(("share", "usable"), [(0.39, False), (0.4, True)])
def test_usable_is_half_of_what_the_full_cache_itself_reaches(tmp_path: Path, share: float, usable: bool) -> None:
    recalls(tmp_path, "full", 0.8, budget=None)
    recalls(tmp_path, "h2o", share)
    (group,) = load_results(tmp_path).groups
    assert is_usable(group, group.budgeted[0], "objects_recalled_fraction") is usable
    assert ("No policy is usable" in text_of(judge(group))) is not usable
    assert is_usable(group, group.budgeted[0], "needles_recalled_fraction") is None, "nothing was measured"


def test_collapses_of_the_policy_to_take_are_counted_in_its_sentence(tmp_path: Path) -> None:
    full(tmp_path)
    cell(tmp_path, "h2o", 0.55, spread=0.4)
    assert re.search(r"`h2o` collapses on \d+ of 24 samples\.", text_of(judged_of(tmp_path)))


def costs(policy: str, ratio: float, stored: float, **more: Any) -> dict[str, Any]:
    """A cell that was timed and weighed, and answered nothing."""
    record = body(policy=policy, **more)
    kept = ("tpot_ms", "ttft_ms", "tpot_ratio_to_full", "ttft_ratio_to_full", "kv_stored_bytes", "peak_memory_bytes")
    record["samples"] = []
    record["measurements"] = {name: record["measurements"][name] for name in kept}
    record["measurements"]["tpot_ratio_to_full"] |= {"value": ratio, "low": ratio - 0.001, "high": ratio + 0.001}
    record["measurements"]["kv_stored_bytes"]["value"] = stored
    return record


def test_costs_alone_get_an_answer_about_speed_and_memory(tmp_path: Path) -> None:
    write_cell(tmp_path, costs("full", 1.0, 1000.0 * 2**20, budget=None))
    for policy, ratio, stored in (("h2o", 0.75, 200.0), ("elastic", 0.76, 200.0), ("random", 0.9, 250.0)):
        write_cell(tmp_path, costs(policy, ratio, stored * 2**20))
    noisy = costs("snapkv", 0.1, 300.0 * 2**20)
    noisy["measurements"]["tpot_spread_fraction"] = {"value": 0.2}
    write_cell(tmp_path, noisy)
    judged = judged_of(tmp_path)
    text = text_of(judged)
    assert text.startswith("No answer was scored here, so this is about speed and memory alone.")
    assert re.search(
        r"the shortest time is that of `h2o`, \S+ ms per output token, 0\.75x \[.*\] of full: faster\.", text
    )
    assert "It is faster than `random`; equivalent within the margin to `elastic`." in text
    assert "the least KV cache is stored by `elastic` and `h2o`: 200 MiB, 0.20x of full's 1,000 MiB" in text
    drawn = answer_html(judged)
    assert "20 % tokens kept: fastest step: <code>h2o</code> or <code>elastic</code>" in drawn
    assert "Not ranked: <code>snapkv</code> (noisy times)" in drawn
    assert "ranked here" not in drawn
    page = render_page(load_results(tmp_path), [])
    assert "no quality<" not in page


def test_what_sees_the_future_is_no_safe_budget_that_one_could_take(tmp_path: Path) -> None:
    cell(tmp_path, "full", 0.8, budget=None)
    cell(tmp_path, "oracle (sees the future)", 0.8, budget=0.2, spread=0.052)
    cell(tmp_path, "h2o", 0.8, budget=0.5, spread=0.052)
    cell(tmp_path, "random", 0.3, budget=0.2)
    judged = judged_of(tmp_path)
    assert [(one.policy, one.budget_fraction) for one in safe_cells(judged)] == [("h2o", 0.5)]
    told = " ".join(answer_sentences(judged))
    assert "is shown to be kept (margin 0.020): 50 % tokens kept" in told
