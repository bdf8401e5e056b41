"""The leaderboard's tables: places by estimate, verdicts of neighbours, and what has no place."""

from __future__ import annotations

import itertools
import tarfile
from pathlib import Path
from typing import Any

import pytest

from kvbench.report.compare import compare, difference_text
from kvbench.report.first_screen import leaderboard
from kvbench.report.leaderboard import (
    Part,
    board,
    board_markdown,
    boards_csv,
    judged_part,
    missing_markdown,
    overview_markdown,
)
from kvbench.report.load import Results, _ordered, load_results, parse_cell
from kvbench.report.publication import main
from kvbench.report.standing import Judged, judge
from tests.report.synthetic import body, write_cell

SCENES = Part(title="scenes", dataset="scenes_asked", task="generation")
POLICIES = ("random", "streaming_llm", "h2o", "elastic")


def record(policy: str, budget: float | None = 0.2, **labels: Any) -> dict[str, Any]:
    made = body(policy=policy, budget=budget, dataset="scenes_asked", **labels)
    made["cell"] |= {"query_visible": True}
    return made


def results_of(*bodies: dict[str, Any]) -> Results:
    return Results(records=tuple(parse_cell(one) for one in bodies), problems=())


def judged_of(name: str, *bodies: dict[str, Any], part: Part = SCENES) -> Judged:
    judged = judged_part(results_of(record("full", None), *bodies), part, name)
    assert judged is not None
    return judged


RECALL = "objects_recalled_fraction"


def test_places_follow_the_estimate_and_verdicts_the_paired_difference_to_the_next() -> None:
    judged = judged_of(RECALL, *map(record, POLICIES))
    places = board(judged, 0.2, RECALL)
    values = [place.cell.measurements[RECALL].value for place in places]
    assert values == sorted(values, reverse=True)
    assert [place.rank for place in places] == [1, 2, 3, 4]
    for place, following in itertools.pairwise(places):
        assert place.next is not None
        assert place.next.second is following.cell
        told = compare(place.cell, following.cell, RECALL)
        assert told is not None
        assert place.next.value == told.value
        assert (place.next.p_holm or 0) >= (told.p_value or 0)
    assert places[-1].next is None


def test_a_pair_has_one_verdict_in_the_table_of_the_docs_on_the_page_and_among_all_pairs() -> None:
    bodies = [record("full", None), *(record(policy, budget) for policy in POLICIES for budget in (0.1, 0.2))]
    results = results_of(*bodies)
    judged = judged_part(results, SCENES, RECALL)
    assert judged is not None
    whole = judge(results.groups[0])
    places = board(judged, 0.2, RECALL)
    shown = [place for place in leaderboard(whole, "20 % tokens kept", RECALL) if place.rank]
    assert [place.next for place in places] == [place.next for place in shown]
    for place in shown[:-1]:
        assert place.next is not None
        assert place.next == whole.between(place.cell, place.next.second, RECALL)
        own = compare(place.cell, place.next.second, RECALL)
        assert own is not None
        assert (place.next.p_holm or 0) > (own.p_value or 0), "corrected over all pairs, not over neighbours alone"


def test_of_a_policy_measured_again_since_it_was_mended_the_newest_record_has_the_place() -> None:
    mended = record("h2o", seed=1) | {"started_utc": "2026-11-24T13:00:00+00:00"}
    for bodies in itertools.permutations([mended, *map(record, POLICIES)], 5):
        places = board(judged_of(RECALL, *bodies), 0.2, RECALL)
        assert len(places) == len(POLICIES)
        assert mended["key"] in {place.cell.key for place in places}
    failed = record("h2o", status="crashed", seed=1) | {"started_utc": "2026-11-24T13:00:00+00:00"}
    places = board(judged_of(RECALL, failed, *map(record, POLICIES)), 0.2, RECALL)
    assert len(places) == len(POLICIES)
    assert not any(place.cell.failed for place in places)


def test_a_perplexity_is_better_where_it_is_less() -> None:
    places = board(judged_of("ppl", *map(record, POLICIES)), 0.2, "ppl")
    values = [place.cell.measurements["ppl"].value for place in places]
    assert values == sorted(values)


def test_what_holds_as_much_as_it_finds_and_what_failed_has_no_place() -> None:
    judged = judged_of(
        "ppl",
        record("h2o"), record("elastic", budget_total="data_dependent"), record("random", status="oom"),
        record("streaming_llm", budget_total="bounded"), record("oracle (sees the future)"),
    )  # fmt: skip
    rows = {place.policy: place for place in board(judged, 0.2, "ppl")}
    assert (rows["h2o"].rank, rows["streaming_llm"].rank) == (1, 2)
    assert (rows["elastic"].rank, rows["elastic"].reason) == (None, "its budget is what it finds to hold")
    assert judged.against_full(rows["elastic"].cell, "ppl") is not None
    assert (rows["oracle (sees the future)"].rank, rows["oracle (sees the future)"].next) == (None, None)
    assert (rows["random"].rank, rows["random"].reason) == (None, "oom")


def test_nobody_is_ranked_where_the_full_cache_cannot_do_the_task() -> None:
    def blind(made: dict[str, Any]) -> dict[str, Any]:
        for sample in made["samples"]:
            sample["objects_recalled_fraction"] = 0.0
        made["measurements"]["objects_recalled_fraction"] |= {"value": 0.0, "low": 0.0, "high": 0.0}
        return made

    judged = judged_part(results_of(*map(blind, [record("full", None), record("h2o")])), SCENES, RECALL)
    assert judged is not None
    (place,) = board(judged, 0.2, RECALL)
    assert (place.rank, place.reason) == (None, "the full cache itself does not do this task")


def test_a_question_that_is_hidden_is_another_part() -> None:
    hidden = record("h2o", seed=1)
    hidden["cell"] |= {"query_visible": False}
    results = results_of(record("full", None), record("h2o"), hidden)
    for question, visible in (("seen", True), ("hidden", False)):
        part = Part(title="", dataset="scenes_asked", task="generation", question=question)
        judged = judged_part(results, part, "ppl")
        assert judged is not None
        assert [cell.settings["query_visible"] for cell in judged.group.budgeted] == [visible]


def test_a_text_that_is_scored_and_gone_on_with_by_two_cells_makes_two_tables() -> None:
    def one_of(policy: str, task: str, measures: tuple[str, ...]) -> dict[str, Any]:
        budget = None if policy == "full" else 0.2
        made = body(policy=policy, budget=budget, dataset="frankenstein_long", seed=len(task))
        made["cell"] |= {"task": {task: {}}, "query_visible": True, "dataset": {"class": "kvbench:TextWindows"}}
        made["measurements"] = {name: made["measurements"][name] for name in measures}
        return made

    tasks = {"perplexity": ("ppl",), "generation": ("rougeL_vs_full", "length_ratio")}
    made = [one_of(policy, *task) for policy in ("full", "h2o", "random") for task in tasks.items()]
    results = Results(records=_ordered([parse_cell(one) for one in made]), problems=())
    for name in ("ppl", "rougeL_vs_full"):
        lines = list(board_markdown(results, {"measure": name, "dataset": "frankenstein_long", "budget": "0.2"}))
        assert lines[0].startswith("Full cache: ")
        assert [line.split(" | ")[:2] for line in lines[4:]] == [["| 1", "h2o"], ["| 2", "random"]]
        assert lines[4].endswith("| better |")


def test_a_row_says_what_the_records_say() -> None:
    results = results_of(record("full", None), *map(record, POLICIES))
    words = {"measure": "rougeL_vs_full", "dataset": "scenes_asked", "budget": "0.2"}
    lines = list(board_markdown(results, words))
    assert lines[0].startswith("Full cache: 1.000")
    assert "| length / full |" in lines[2]
    full, h2o = (next(cell for cell in results.records if cell.policy == name) for name in ("full", "h2o"))
    told = compare(h2o, full, "rougeL_vs_full")
    assert told is not None
    (line,) = (line for line in lines if "| h2o |" in line)
    assert f"| {difference_text(told)} |" in line
    csv = boards_csv(results)
    assert csv.startswith("dataset,question,budget,measure,place,policy,key")
    assert csv.count("\n") == 1 + 4  # objects recalled alone is both ranked and measured


def test_policies_without_a_record_are_named_and_so_is_a_failure() -> None:
    lines = list(missing_markdown(results_of(record("full", None), record("h2o", status="oom")), {}))
    (line,) = (line for line in lines if line.startswith("| pictures |") and "no record" in line)
    assert "snapkv" in line
    assert " h2o," not in line
    assert any("h2o, 20 % tokens kept" in line and "oom: OutOfMemoryError" in line for line in lines)


def test_what_is_not_measured_yet_is_told_from_what_has_no_record_at_all_and_the_command_that_goes_on() -> None:
    lines = list(missing_markdown(results_of(record("h2o"), record("h2o", 0.1), record("random", 0.1)), {}))
    assert "| recall, question hidden | all | not measured yet (recall_hidden) |" in lines
    assert "| pictures | random at 20 %, full | not measured yet (scenes) |" in lines
    parts = "text,recall,recall_hidden,rouge,scenes"
    assert lines[-1].startswith(f"`kvbench +experiment=leaderboard leaderboard.parts=[{parts}] results=FOLDER`")
    words = {"measure": "objects_recalled_fraction", "dataset": "scenes_asked", "budget": "0.2"}
    assert next(board_markdown(results_of(record("h2o")), words)).startswith("Full cache: not measured yet: `kvbench ")


def test_a_policy_of_other_positions_is_chosen_for_an_overview_by_its_name() -> None:
    results = results_of(record("full", None), record("h2o"), record("streaming_llm", positions="in_cache"))
    rows = list(overview_markdown(results, {"budget": "0.2", "policies": "streaming_llm"}))
    assert [row.split(" | ")[0] for row in rows[2:]] == ["| streaming_llm (in_cache)"]


def test_a_row_says_when_the_policy_cuts() -> None:
    block = record("snapkv_decode", evicts_at="prompt and decode")
    block["cell"]["policy"] |= {"every_tokens": 128}
    made = (record("snapkv", evicts_at="prompt"), record("h2o", evicts_at="prompt and decode"), block)
    words = {"measure": "ppl", "dataset": "scenes_asked", "budget": "0.2"}
    rows = [line.split(" | ") for line in board_markdown(results_of(record("full", None), *made), words)]
    told = {row[1]: row[2] for row in rows if row[0].startswith("| ") and len(row) > 3}
    assert told["snapkv"] == "the prompt"
    assert told["h2o"] == "every token"
    assert told["snapkv_decode"] == "every 128 tokens"


@pytest.mark.parametrize("packed", [False, True])
def test_a_page_is_made_from_records_that_lie_open_or_packed(tmp_path: Path, packed: bool) -> None:
    folder = tmp_path / "results" / "published" / "one"
    for one in (record("full", None), *map(record, POLICIES)):
        write_cell(folder, one)
    assert len(load_results(folder).records) == 5
    if packed:
        with tarfile.open(folder / "cells.tar.xz", "w:xz") as archive:
            for path in sorted(folder.glob("cells/*/record.json")):
                archive.add(path, path.relative_to(folder))
                path.unlink()
    (folder / "leaderboard.csv").touch()
    words = "records=results/published/one kind=board measure=ppl dataset=scenes_asked budget=0.2"
    drawn = "file=board.svg records=results/published/one kind=board measure=ppl dataset=scenes_asked budget=0.2 by=0.2"
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "page.md"
    page.write_text(f"<!-- table: {words} -->\n<!-- end of table -->\n<!-- figure: {drawn} -->\n")
    assert main([str(tmp_path)]) == 0
    assert "| 1 | elastic |" in page.read_text()
    assert (tmp_path / "docs" / "board.svg").read_text().startswith("<?xml")
    assert "elastic" in (folder / "leaderboard.csv").read_text()
    assert main([str(tmp_path), "--check"]) == 0
