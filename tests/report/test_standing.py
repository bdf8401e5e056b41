from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvbench.measures import measure
from kvbench.report.compare import difference_interval, group_comparisons, p_text
from kvbench.report.load import Group, load_results
from kvbench.report.page import render_page
from kvbench.report.page_tables import matrices_html
from kvbench.report.standing import (
    MOST_PAIRS,
    MOST_SIDE,
    Match,
    Matrix,
    best_policies,
    judge,
    leading_matrix,
    matrices,
    unlike,
)
from tests.report.synthetic import body, write_cell


def group_of(folder: Path, *bodies: dict[str, object]) -> Group:
    for one in bodies:
        write_cell(folder, one)
    (group,) = load_results(folder).groups
    return group


def test_the_best_value_at_each_budget_wins_and_the_runner_up_is_compared_with_it(tmp_path: Path) -> None:
    policies = ("full", "random", "h2o", "elastic")
    cells = [body(policy=name, budget=None if name == "full" else at) for name in policies for at in (0.2, 0.5)]
    group = group_of(tmp_path, *{one["key"]: one for one in cells}.values())
    found = {(one.budget, one.measure): one for one in best_policies(group, group_comparisons(group))}
    assert {budget for budget, _ in found} == {"20 % tokens kept", "50 % tokens kept"}
    for (budget, name), one in found.items():
        values = {cell.policy: cell.estimate(name) for cell in group.budgeted if cell.budget == budget}
        known = {policy: estimate.value for policy, estimate in values.items() if estimate}
        choose = min if name in ("ppl", "kl_to_full") or name.endswith(("_ms", "_bytes", "_ratio_to_full")) else max
        assert known[one.cell.policy] == choose(known.values())
        del known[one.cell.policy]
        assert known[one.runner_up.policy] == choose(known.values())
    clear = found["20 % tokens kept", "ppl"]
    assert (clear.cell.policy, clear.runner_up.policy, clear.verdict) == ("elastic", "h2o", "better")
    (direct,) = (
        one
        for one in group_comparisons(group)
        if one.measure == "ppl" and {one.first.key, one.second.key} == {clear.cell.key, clear.runner_up.key}
    )
    turned = {"better": "worse", "worse": "better"}
    same_way = direct.first.key == clear.cell.key
    assert clear.verdict == (direct.verdict if same_way else turned[direct.verdict])


def test_noisy_times_are_never_the_best_and_one_policy_alone_has_nobody_to_beat(tmp_path: Path) -> None:
    group = group_of(
        tmp_path,
        body(policy="full", budget=None),
        body(policy="elastic", status="noisy"),
        body(policy="h2o"),
        body(policy="random"),
        body(policy="h2o", budget=0.5),
    )
    found = best_policies(group, group_comparisons(group))
    assert {one.budget for one in found} == {"20 % tokens kept"}
    ranked = {name: {cell.policy for one in found if one.measure == name for cell in (one.cell, one.runner_up)}
              for name in ("tpot_ratio_to_full", "ppl")}  # fmt: skip
    assert ranked == {"tpot_ratio_to_full": {"h2o", "random"}, "ppl": {"elastic", "h2o"}}


def match_of(matrix: Matrix, row: str, column: str, budget: str = "20 % tokens kept") -> Match | None:
    (found,) = (one for one in matrix.rows if (one.policy, one.budget) == (row, budget))
    return found.matches[matrix.columns.index(column)]


def test_a_matrix_says_of_every_pair_what_the_comparison_says_from_both_sides(sweep_folder: Path) -> None:
    (group,) = load_results(sweep_folder).groups
    judged = judge(group)
    found = {one.measure: one for one in matrices(judged)}
    assert next(iter(found)) == judged.primary
    assert {"ppl", "objects_recalled_fraction", "tpot_ratio_to_full"} <= set(found)
    compared = [one for one in group_comparisons(group) if not one.second.is_full and one.measure in found]
    assert len(compared) == 18 * len(found)
    opposite = {"better": "worse", "worse": "better"}
    for one in compared:
        first, second = one.first.policy, one.second.policy
        there = match_of(found[one.measure], first, second, one.first.budget)
        back = match_of(found[one.measure], second, first, one.first.budget)
        assert there is not None
        assert back is not None
        assert there.comparison == one
        assert there.word == opposite.get(back.word, back.word) == one.verdict
        assert match_of(found[one.measure], first, first, one.first.budget) is None
        assert there.numbers[1:] == (difference_interval(one), p_text(one.p_holm))
    assert leading_matrix(group) == found[str(judged.primary)]


def test_only_like_is_compared_with_like(tmp_path: Path) -> None:
    """A policy of one mode stands for itself; of one that was measured in both modes only the same one is compared."""
    cells = [body(policy=name, positions=mode) for name in ("h2o", "random") for mode in ("original", "in_cache")]
    group = group_of(tmp_path, *cells, body(policy="streaming_llm", positions="in_cache"), body(policy="elastic"))
    matrix = leading_matrix(group)
    assert matrix is not None
    told = {
        (row.policy, column)
        for row in matrix.rows
        for column, one in zip(matrix.columns, row.matches, strict=True)
        if one is not None and one.comparison is not None
    }
    stands = {pair for pair in told if "h2o (original)" in pair}
    assert {one for pair in stands for one in pair} == {"h2o (original)", "random (original)", "elastic"}
    assert ("streaming_llm (in_cache)", "elastic") in told
    assert ("streaming_llm (in_cache)", "h2o (in_cache)") in told
    across = match_of(matrix, "h2o (original)", "h2o (in_cache)")
    assert across is not None
    assert (across.text, across.reason) == ("not compared", "not like with like: positions in_cache and original")
    assert "Not compared, 8 pairs: not like with like: positions in_cache and original." in matrix.note
    assert across.reason in render_page(load_results(tmp_path), [])


def test_two_variants_of_a_policy_are_not_two_policies(tmp_path: Path) -> None:
    group = group_of(tmp_path, body(seed=0), body(seed=1), body(policy="elastic"))
    one, two, other = sorted(group.cells, key=lambda cell: (cell.policy != "h2o", cell.variant))
    assert unlike(one, two, group.cells).startswith("not like with like: variant ")
    assert unlike(one, other, group.cells) == ""


def test_a_pair_that_can_not_be_told_says_why(tmp_path: Path) -> None:
    noisy = body(policy="elastic")
    noisy["measurements"]["tpot_spread_fraction"] = {"value": 0.08, "low": None, "high": None, "n": 1, "unit": ""}
    cells = [noisy, body(policy="h2o"), body(policy="random", status="oom"), body(policy="random", budget=0.5)]
    group = group_of(tmp_path, body(policy="full", budget=None), *cells, body(policy="h2o", budget=0.5))
    found = {one.measure: one for one in matrices(judge(group))}
    failed = match_of(found["rougeL_vs_full"], "h2o", "random")
    assert failed is not None
    assert (failed.text, failed.reason) == ("not compared", "random ended oom at this budget")
    time = match_of(found["tpot_ratio_to_full"], "h2o", "elastic")
    assert time is not None
    assert time.word == "noisy"
    assert time.reason.startswith("elastic: runs of one setting spread by 8.0%")
    assert " p " not in time.text
    absent = match_of(found["rougeL_vs_full"], "h2o", "elastic", "50 % tokens kept")
    assert absent is not None
    assert absent.reason == "elastic was not measured at this budget"
    drawn = render_page(load_results(tmp_path), [])
    assert 'title="random ended oom at this budget"' in drawn


def test_of_very_many_policies_the_best_stand_in_the_matrix_of_the_leading_measure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvbench.report.standing.MOST_PAIRS", 2)
    monkeypatch.setattr("kvbench.report.standing.MOST_SIDE", 2)
    assert MOST_SIDE * (MOST_SIDE - 1) / 2 > MOST_PAIRS
    group = group_of(tmp_path, *(body(policy=name) for name in ("elastic", "h2o", "random")))
    (matrix,) = matrices(judge(group))
    assert matrix.columns == ("elastic", "h2o")
    assert matrix.note.endswith(
        "Bonferroni's correction over all pairs at equal budget in this measure. The 2 best of 3 policies."
    )
    (found,) = (one for row in matrix.rows for one in row.matches if one and one.comparison and row.policy == "h2o")
    assert found.comparison is not None
    assert found.comparison.p_holm == min(1.0, 3 * (found.comparison.p_value or 0.0))


def test_the_page_has_a_matrix_per_measure_and_budget_with_the_leading_one_open(sweep_folder: Path) -> None:
    judged = judge(load_results(sweep_folder).groups[0])
    drawn, leading = matrices_html(judged), measure(str(judged.primary)).label
    folds = re.findall(r"<details( open|)><summary>(.*?)</summary>", drawn)
    assert folds[0] == (" open", f"{leading}, higher is better")
    assert {state for state, _ in folds[1:]} == {""}
    assert drawn.count("<table><caption>") == 3 * len(folds) == drawn.count("class=scroll tabindex=0 role=region")
    assert "<caption>PPL at 20&nbsp;% tokens kept, tiny-llava on scenes</caption>" in drawn
    assert drawn.count("<th scope=row") == 12 * len(folds)
    assert drawn.count('title="the same policy"') == 12 * len(folds)
    assert "<button" not in drawn
    assert not re.search(r"\bp [=&]|, [+\u2212]", drawn), "no line breaks within a number"
