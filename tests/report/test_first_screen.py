"""The leaderboard: ranks, what stands beside them, the two sentences above, and the data that the page draws."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest

from kvbench.report.figures.draw import palette_of
from kvbench.report.figures.living import group_data
from kvbench.report.first_screen import board_markdown, board_measures, board_rows, headline, in_short, leaderboard
from kvbench.report.load import load_results
from kvbench.report.page import render_page
from kvbench.report.standing import Judged, judge
from tests.report.synthetic import body, without_facts, write_cell, write_sweep

RECALL, BUDGET = "objects_recalled_fraction", "20 % tokens kept"


def judged_of(folder: Path) -> Judged:
    (group,) = load_results(folder).groups
    return judge(group)


@pytest.fixture(scope="module")
def judged(sweep_folder: Path) -> Judged:
    return judged_of(sweep_folder)


def test_full_stands_first_and_policies_by_their_value_with_the_verdict_against_the_next(judged: Judged) -> None:
    full, *places = leaderboard(judged, BUDGET, RECALL)
    assert (full.policy, full.rank, full.word, full.share) == ("full", None, "reference", 1.0)
    values = [place.quality.value for place in places if place.quality]
    assert values == sorted(values, reverse=True)
    assert [place.rank for place in places] == [1, 2, 3, 4]
    for one, after in itertools.pairwise(places):
        assert one.next is not None
        assert (one.next.first.key, one.next.second.key) == (one.cell.key, after.cell.key)
        found = judged.between(one.cell, after.cell, RECALL)
        assert found is not None
        assert one.word == found.verdict
    assert places[-1].word == ""
    for place in places:
        assert place.stored_share == pytest.approx(0.2, abs=0.01)
        assert place.num_samples == 32


def test_lower_is_better_where_it_is(judged: Judged) -> None:
    values = [place.quality.value for place in leaderboard(judged, BUDGET, "ppl")[1:] if place.quality]
    assert values == sorted(values)


def test_what_failed_was_noisy_or_not_measured_has_no_rank_and_says_why(tmp_path: Path) -> None:
    write_cell(tmp_path, body(policy="full", budget=None))
    write_cell(tmp_path, body(policy="h2o"))
    write_cell(tmp_path, body(policy="snapkv", status="oom"))
    write_cell(tmp_path, body(policy="elastic", status="noisy"))
    write_cell(tmp_path, without_facts(body(policy="random")))
    judged = judged_of(tmp_path)
    words = {place.policy: (place.rank, place.word) for place in leaderboard(judged, BUDGET, RECALL)}
    assert words["snapkv"] == (None, "oom")
    assert words["random"] == (None, "not measured")
    assert words["elastic"][0] == 1, "a noisy clock takes nothing from its quality"
    times = {place.policy: (place.rank, place.word) for place in leaderboard(judged, BUDGET, "tpot_ratio_to_full")}
    assert times["elastic"] == (None, "noisy")


def test_what_sees_the_future_or_takes_its_own_budget_has_no_rank_and_is_never_to_be_taken(tmp_path: Path) -> None:
    write_cell(tmp_path, body(policy="full", budget=None))
    write_cell(tmp_path, body(policy="h2o"))
    write_cell(tmp_path, body(policy="random"))
    for policy, labels in (("oracle (sees the future)", {}), ("sized", {"budget_total": "data_dependent"})):
        best = body(policy="full", budget=0.2)
        write_cell(tmp_path, body(policy=policy, **labels) | {part: best[part] for part in ("measurements", "samples")})
    judged = judged_of(tmp_path)
    words = {place.policy: (place.rank, place.word) for place in leaderboard(judged, BUDGET, RECALL)}
    assert words["oracle (sees the future)"] == (None, "a bound, sees the future")
    assert words["sized"] == (None, "own budget")
    assert words["h2o"][0] == 1
    assert "`h2o`" in headline(judged, BUDGET)[0]
    assert "oracle" not in " ".join(headline(judged, BUDGET))


def test_nobody_is_ranked_where_the_full_cache_can_not_do_the_task(tmp_path: Path) -> None:
    for policy, budget in (("full", None), ("h2o", 0.2), ("random", 0.2)):
        record = body(policy=policy, budget=budget)
        record["measurements"][RECALL] |= {"value": 0.01, "low": 0.0, "high": 0.02}
        for sample in record["samples"]:
            sample[RECALL] = 0.01
        write_cell(tmp_path, record)
    places = leaderboard(judged_of(tmp_path), BUDGET, RECALL)
    assert {place.rank for place in places} == {None}
    assert {place.word for place in places} == {"reference", "not ranked"}


def test_two_sentences_say_what_to_take_how_sure_what_it_costs_and_where_it_fails(judged: Judged) -> None:
    first, second = headline(judged, BUDGET)
    assert first.startswith(f"At {BUDGET} ")
    assert re.search(r"`\w+` \(objects recalled \d+\.\d % \[", first)
    assert "better than" in first
    for part in ("the full cache (", "stores 1.60 MiB of keys and values, 0.20x of full's", "per token", "fails on"):
        assert part in second
    assert first.count(". ") == second.count(". ") == 0


def test_a_policy_that_is_not_shown_to_be_the_best_is_not_to_be_taken(judged: Judged) -> None:
    for budget in judged.group.by_budget:
        first = headline(judged, budget)[0]
        top = leaderboard(judged, budget, RECALL)[1]
        is_clear = all(
            (found := judged.between(top.cell, place.cell, RECALL)) and found.verdict == "better"
            for place in leaderboard(judged, budget, RECALL)[2:]
        )
        assert (" take " in first) == is_clear


def test_costs_alone_are_ranked_by_time(tmp_path: Path) -> None:
    for policy, budget in (("full", None), ("h2o", 0.2), ("random", 0.2)):
        record = body(policy=policy, budget=budget)
        record["samples"] = []
        kept = ("tpot_ms", "tpot_ratio_to_full", "kv_stored_bytes")
        record["measurements"] = {name: record["measurements"][name] for name in kept}
        write_cell(tmp_path, record)
    judged = judged_of(tmp_path)
    assert board_measures(judged) == ("tpot_ratio_to_full",)
    assert "the shortest step is that of" in headline(judged, BUDGET)[0]


def test_bars_stay_inside_and_hold_their_interval(judged: Judged) -> None:
    for name in board_measures(judged):
        for row in board_rows(judged, BUDGET, name):
            low, value, high = row["at"]
            assert 0.0 <= low <= value <= high <= 100.0


def test_markdown_has_the_places_of_the_page(judged: Judged) -> None:
    lines = board_markdown(judged, BUDGET, RECALL)
    assert [line.split(" | ")[1] for line in lines[2:]] == [
        place.policy for place in leaderboard(judged, BUDGET, RECALL)
    ]


def test_what_the_script_draws_are_the_records_numbers(sweep_folder: Path, judged: Judged) -> None:
    results = load_results(sweep_folder)
    data = group_data(judged, palette_of(results))
    assert json.loads(json.dumps(data)) is not None
    assert data["asked"] == BUDGET
    for cell, shown in zip(judged.group.cells, data["cells"], strict=True):
        assert shown["key"] == cell.key[:16]
        for name, (value, low, high, n, _) in shown["numbers"].items():
            found = cell.estimate(name)
            assert found is not None
            assert value == pytest.approx(found.value, rel=1e-5)
            assert (low is None, high is None, n) == (found.low is None, found.high is None, found.n)
    assert set(data["boards"]) == set(judged.group.by_budget)
    lost = data["lost"]
    assert len(lost["samples"]) == 32
    assert len(lost["cells"]) == 12


@pytest.mark.long
def test_a_page_of_a_hundred_cells_is_under_three_megabytes(tmp_path: Path) -> None:
    write_cell(tmp_path, body(policy="full", budget=None))
    for index in range(33):
        for budget in (0.1, 0.2, 0.5):
            write_cell(tmp_path, body(policy=f"policy_{index}", budget=budget))
    page = render_page(load_results(tmp_path), [])
    assert len(page.encode()) < 3_000_000


def test_the_static_table_is_the_one_that_the_script_would_draw(tmp_path: Path) -> None:
    results = load_results(write_sweep(tmp_path))
    page = render_page(results, [])
    start = page.index("<table class=places>")
    table = page[start : page.index("</table>", start)]
    (group,) = results.groups
    for row in board_rows(judge(group), BUDGET, RECALL):
        assert f'data-policy="{row["policy"]}"' in table
        assert row["value"] in table
        assert row["stored"] in table


def test_of_several_groups_each_says_its_first_and_how_many_are_not_shown_worse(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path)
    alone = render_page(load_results(folder), [])
    assert "class=firsts>" not in alone, "one group has its headline"
    for policy, budget in (("full", None), ("h2o", 0.2), ("random", 0.2)):
        write_cell(folder, body(policy=policy, budget=budget, model="zz-model"))
    results = load_results(folder)
    (listed,) = re.findall(r"Best at 20&nbsp;% tokens kept:.*?</ul>", render_page(results, []), re.DOTALL)
    for group in results.groups:
        words = in_short(judge(group), BUDGET)
        assert words.split("`")[1] in headline(judge(group), BUDGET)[0]
        assert f">{group.title}</a>: <code>{words.split('`')[1]}</code>, " in listed
