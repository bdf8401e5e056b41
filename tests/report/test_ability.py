"""A full cache that can not do the task ranks nobody, in whatever the numbers are shown."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from kvbench.report.answer import answer_html, answer_sentences
from kvbench.report.compare import DECLARED, Ability, group_comparisons, leading_quality
from kvbench.report.figures.draw import palette_of
from kvbench.report.figures.pareto import pareto_figure
from kvbench.report.figures.style import Look as PlotLook
from kvbench.report.findings import above_random, budget_steps, not_monotone, notes_of
from kvbench.report.load import Group, Results, load_results
from kvbench.report.page import render_page
from kvbench.report.page_tables import frontier_html, matrices_html
from kvbench.report.standing import best_policies, judge, safe_cells, standing_at
from kvbench.report.tables import markdown_tables, print_tables
from kvbench.report.verdicts import verdicts_csv, verdicts_latex, verdicts_markdown
from kvbench.results.frontier import Frontier, Look, Search
from kvbench.sinks.wandb.report import _COMPARED, _headline, _verdict_table
from tests.report.synthetic import body, write_cell

SENTENCE = "This data set can not rank policies on this model"
NEEDLES = "needles_recalled_fraction"


def record(
    policy: str, budget: float | None = 0.2, *, found: tuple[int, int], name: str = NEEDLES, **fields: Any
) -> dict[str, Any]:
    """A cell of `found[1]` samples, each asking for one needle, of which the first `found[0]` are named."""
    made = body(policy=policy, budget=budget, num_samples=found[1], dataset="needles")
    made["measurements"].pop("objects_recalled_fraction")
    share = found[0] / found[1]
    half = 2 * (share * (1 - share) / found[1]) ** 0.5
    made["measurements"][name] = {
        "value": share, "low": max(0.0, share - half), "high": min(1.0, share + half), "n": found[1], "unit": "",
        "method": "BCa bootstrap over samples",
    }  # fmt: skip
    for number, sample in enumerate(made["samples"]):
        sample.pop("objects_recalled_fraction")
        sample |= {name: float(number < found[0]), "reference": str(10_000 + number)}
        sample |= {field: make(number) if callable(make) else make for field, make in fields.items()}
    return made


def results_of(folder: Path, *records: dict[str, Any]) -> Results:
    for one in records:
        write_cell(folder, one)
    return load_results(folder)


def group_of(folder: Path, *records: dict[str, Any]) -> Group:
    (group,) = results_of(folder, *records).groups
    return group


@pytest.fixture
def unable(tmp_path: Path) -> Results:
    """What a model of 135M parameters did: 10 % of the needles with the full cache, 20 % with streaming_llm."""
    return results_of(
        tmp_path,
        record("full", None, found=(2, 20)),
        record("streaming_llm", found=(4, 20)),
        record("random", found=(0, 20)),
        record("random", 0.5, found=(1, 20)),
    )


@pytest.mark.parametrize(
    ("found", "ranks"),
    [((2, 20), False), ((20, 200), False), ((5, 20), False), ((60, 200), True), ((10, 20), True), ((20, 20), True)],
)
def test_the_interval_of_the_full_caches_score_must_be_clear_of_chance(
    tmp_path: Path, found: tuple[int, int], ranks: bool
) -> None:
    group = group_of(tmp_path, record("full", None, found=found), record("h2o", found=(found[0] // 2, found[1])))
    assert (Ability(group).sentence == "") == ranks
    assert all((one.verdict == "not ranked") != ranks for one in group_comparisons(group) if one.measure == NEEDLES)


def test_the_sentence_says_score_and_what_was_asked_for(unable: Results) -> None:
    (group,) = unable.groups
    sentence = Ability(group).sentence
    assert sentence.startswith(f"{SENTENCE}: the full cache itself reaches needles found 10.0 % [0.0, 31.7], which is")
    assert "not clear of 10.0 %, 10% of the way from chance (0.0 %) to a perfect score" in sentence


def test_chance_is_what_a_constant_answer_scores(tmp_path: Path) -> None:
    """55 % of yes-or-no questions are as good as always saying no."""

    def yes_or_no(number: int) -> str:
        return "yes" if number % 2 else "No"

    fields: dict[str, Any] = {"reference": yes_or_no, "rougeL_vs_reference": 0.5}
    cells = [record("full", None, found=(110, 200), name="exact_fraction", **fields)]
    cells[0]["measurements"]["rougeL_vs_reference"] |= {"value": 0.5, "low": 0.45, "high": 0.55}
    ability = Ability(group_of(tmp_path, *cells))
    assert "from chance (50.0 %)" in ability.sentence
    cells[0]["measurements"]["exact_fraction"] |= {"value": 0.9, "low": 0.8, "high": 0.95}
    assert Ability(group_of(tmp_path / "better", *cells)).sentence == ""


@pytest.mark.parametrize(("found", "ranks"), [((18, 20), True), ((4, 20), False)])
def test_questions_answered_right_lead_and_must_be_clear_of_the_commonest_answer(
    tmp_path: Path, found: tuple[int, int], ranks: bool
) -> None:
    fields: dict[str, Any] = {"reference": lambda number: ("One.", "Two.", "In A1.")[number % 3]}
    records = [record("full", None, found=found, name="answers_right_fraction", **fields)]
    records.append(record("h2o", found=(2, 20), name="answers_right_fraction", **fields))
    group = group_of(tmp_path, *records)
    assert leading_quality(group) == "answers_right_fraction"
    assert (Ability(group).sentence == "") == ranks
    assert ranks or "reaches answers right 20.0 %" in Ability(group).sentence


def test_a_long_reference_need_not_be_met_exactly(tmp_path: Path) -> None:
    """Where no facts are known, closeness to the reference is enough."""
    assert Ability(group_of(tmp_path, record("full", None, found=(0, 20), name="exact_fraction"))).sentence == ""


def test_empty_answers_of_the_full_cache_rank_nobody(tmp_path: Path) -> None:
    def mostly_empty(number: int) -> str:
        return " " if number < 11 else "a text"

    group = group_of(tmp_path, record("full", None, found=(20, 20), text=mostly_empty), record("h2o", found=(9, 20)))
    assert "the full cache's answer is empty on 11 of 20 samples" in Ability(group).sentence
    (note, *_) = notes_of(group)
    assert note.text.startswith(SENTENCE)


def test_some_empty_answers_are_counted_in_a_note(tmp_path: Path) -> None:
    group = group_of(
        tmp_path,
        record("full", None, found=(20, 20), text=lambda number: "" if number < 3 else "a text"),
        record("h2o", found=(9, 20)),
    )
    assert Ability(group).sentence == ""
    (note,) = [note for note in notes_of(group) if "empty" in note.text]
    assert "ROUGE 1.0" in note.text
    assert note.details == ("full: 3 of 20 answers",)


def test_without_a_full_cache_or_an_own_measure_nothing_is_withheld(tmp_path: Path) -> None:
    assert Ability(group_of(tmp_path, record("h2o", found=(0, 20)))).sentence == ""
    only_ppl = record("full", None, found=(0, 20))
    for name in (NEEDLES, "rougeL_vs_reference"):
        only_ppl["measurements"].pop(name)
    assert Ability(group_of(tmp_path, only_ppl)).sentence == ""


def test_times_are_compared_as_ever(unable: Results) -> None:
    (group,) = unable.groups
    verdicts = {one.verdict for one in group_comparisons(group) if one.measure == "tpot_ratio_to_full"}
    assert verdicts
    assert "not ranked" not in verdicts
    assert {one.measure for one in best_policies(group, group_comparisons(group))} <= {
        *("ttft_ms", "tpot_ms", "tpot_p90_ms", "settle_ms", "policy_ms", "roof_ms", "tpot_ratio_to_full"),
        *("ttft_ratio_to_full", "roof_share_fraction"),
        *(name for cell in group.cells for name in cell.measurements if name.endswith("_bytes")),
    }


def test_a_turn_that_full_can_not_do_ranks_nobody_and_the_other_does(tmp_path: Path) -> None:
    cells = []
    for policy, budget in (("full", None), ("h2o", 0.2)):
        made = record(policy, budget, found=(18, 20), name=f"turn1_{NEEDLES}")
        other = record(policy, budget, found=(1, 20), name=f"turn2_{NEEDLES}")
        made["measurements"][f"turn2_{NEEDLES}"] = other["measurements"][f"turn2_{NEEDLES}"]
        for one, two in zip(made["samples"], other["samples"], strict=True):
            one[f"turn2_{NEEDLES}"] = two[f"turn2_{NEEDLES}"]
        cells.append(made)
    group = group_of(tmp_path, *cells)
    verdicts = {one.measure: one.verdict for one in group_comparisons(group)}
    assert verdicts[f"turn2_{NEEDLES}"] == "not ranked"
    assert verdicts[f"turn1_{NEEDLES}"] != "not ranked"
    assert Ability(group).sentence == ""
    assert "Turn 2 of the conversations can not rank policies" in " ".join(note.text for note in notes_of(group))


def terminal(results: Results) -> str:
    console = Console(file=io.StringIO(), width=160)
    print_tables(results, console)
    assert isinstance(console.file, io.StringIO)
    return " ".join(console.file.getvalue().split())


def wandb(results: Results) -> str:
    (group,) = results.groups
    compared = group_comparisons(group, DECLARED, _COMPARED)
    return "\n".join([*_headline(group, compared), _verdict_table(group, compared)])


SHOWN: dict[str, Callable[[Results], str]] = {
    "terminal": terminal,
    "table.md": markdown_tables,
    "--format md": lambda results: verdicts_markdown([judge(group) for group in results.groups]),
    "--format latex": lambda results: verdicts_latex([judge(group) for group in results.groups]),
    "answer in words": lambda results: "\n".join(answer_sentences(judge(results.groups[0]))),
    "answer on the page": lambda results: answer_html(judge(results.groups[0])),
    "notes": lambda results: "\n".join(note.text for note in notes_of(results.groups[0])),
    "W&B report": wandb,
    "page": lambda results: render_page(results, []),
}


@pytest.mark.parametrize("place", SHOWN)
def test_every_place_says_so_and_names_no_winner(unable: Results, place: str) -> None:
    text = SHOWN[place](unable)
    assert SENTENCE in text.replace("<b>", "").replace("</b>", "")
    for claim in ("is best with", "At 20 % tokens kept take", "below `random`", "worse than the full cache ("):
        assert claim not in text


def test_no_policy_beats_another_and_each_pair_says_why(unable: Results) -> None:
    drawn = matrices_html(judge(unable.groups[0])).split("<summary>")
    qualities = [part for part in drawn[1:] if "TPOT" not in part and "TTFT" not in part]
    assert len(qualities) > 2
    for part in qualities:
        assert part.count(">not ranked<small>") == 2
        assert part.count('title="the full cache itself does not do this task') == 2
        assert "Not ranked, 1 pair: the full cache itself does not do this task." in part
        assert not re.search(r"v-(better|worse)|p\s[=&]", part.partition("</p>")[2])


def test_no_row_of_the_csv_has_a_verdict_on_quality(unable: Results) -> None:
    lines = verdicts_csv([judge(group) for group in unable.groups]).splitlines()
    heads = lines[0].split(",")
    rows = [dict(zip(heads, line.split(","), strict=False)) for line in lines[1:]]
    assert {row["verdict"] for row in rows} == {"not ranked", "reference"}


def test_nothing_is_ranked_safe_or_found_odd(unable: Results) -> None:
    (group,) = unable.groups
    judged = judge(group)
    assert safe_cells(judged) == []
    assert all(
        standing_at(judged, cells, name) is None for cells in group.by_budget.values() for name in (NEEDLES, "ppl")
    )
    assert above_random(group).contrasts == budget_steps(group).contrasts == ()
    assert not_monotone(group) == []


def test_no_front_is_drawn(unable: Results) -> None:
    (group,) = unable.groups
    figure = pareto_figure(group, PlotLook(palette=palette_of(unable)))
    assert figure is not None
    fronts = [line for axes in figure.axes for line in axes.lines if line.get_label() == "front"]
    assert fronts
    assert all(len(line.get_xdata()) == 0 for line in fronts)


def test_a_search_that_was_made_before_names_no_budget(unable: Results) -> None:
    (group,) = unable.groups
    assert group.full is not None
    look = Look(budget=0.2, outcome="safe", value=0.1, low=0.0, high=0.2)
    search = Search(
        model="m", dataset="needles", policy="streaming_llm", positions="original", policy_settings={},
        full_key=group.full.key, status="found", smallest_safe=0.2, budget_low=0.2, looks=(look,),
    )  # fmt: skip
    frontier = Frontier(
        name="n", measure=NEEDLES, margin=0.02, ladder=(0.2, 0.5), budget_setting="fraction", confidence=0.95,
        num_cells=2, num_cells_of_grid=3, searches=(search,),
    )  # fmt: skip
    assert "not ranked" in frontier_html([frontier], groups=[group])
    able = replace(search, full_key="another")
    assert "not ranked" not in frontier_html([replace(frontier, searches=(able,))], groups=[group])


@pytest.mark.parametrize("place", [place for place in SHOWN if place not in ("notes", "answer on the page")])
def test_every_place_says_that_no_policy_is_usable_and_how_long_the_answers_are(tmp_path: Path, place: str) -> None:
    full, cut = record("full", None, found=(19, 20)), record("h2o", found=(2, 20))
    cut["measurements"]["length_ratio"] |= {"value": 0.4}
    text = SHOWN[place](results_of(tmp_path, full, cut)).replace(r"\%", "%").replace("&nbsp;", " ")
    assert "No policy is usable at 20 % tokens kept: best needles found 10.0 %" in text
    if "in words" not in place:
        assert "1 of 2 cells have 40 % of the full cache's length" in text.replace("&#x27;", "'")


@pytest.mark.parametrize("place", [place for place in SHOWN if place != "notes"])
def test_every_place_answers_for_costs_alone(tmp_path: Path, place: str) -> None:
    cells = [body(policy="full", budget=None), body(policy="h2o")]
    for one in cells:
        one["samples"] = []
        one["measurements"] = {name: one["measurements"][name] for name in ("tpot_ms", "tpot_ratio_to_full")}
    assert "this is about speed and memory alone." in SHOWN[place](results_of(tmp_path, *cells))


def test_windows_of_running_text_rank_by_perplexity_however_the_full_cache_goes_on(tmp_path: Path) -> None:
    """A continuation is no answer; a data set that asks something stays under the rule."""
    cells = [record("full", None, found=(0, 20), name="rougeL_vs_reference"), record("h2o", found=(0, 20))]
    asked = group_of(tmp_path / "asked", *cells)
    assert Ability(asked).reason("ppl") == "the full cache itself does not do this task"
    for one in cells:
        one["cell"]["dataset"] = {"class": "kvbench:TextWindows"}
    text = group_of(tmp_path / "text", *cells)
    assert Ability(text).reason("ppl") == ""
    assert leading_quality(text) == "ppl"
    assert {one.verdict for one in group_comparisons(text) if one.measure == "ppl"} <= {"better", "worse", "equivalent"}
