from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from kvbench.report.compare import timing_noise
from kvbench.report.findings import notes_of
from kvbench.report.load import load_results
from kvbench.report.standing import judge
from kvbench.report.tables import markdown_tables, print_tables, results_table, verdict_rows
from kvbench.report.verdicts import verdict_table
from tests.report.synthetic import body, write_cell, write_sweep


def printed(folder: Path, width: int) -> str:
    console = Console(width=width, record=True, color_system=None, file=io.StringIO())
    print_tables(load_results(folder), console)
    return console.export_text()


@pytest.mark.parametrize("width", [60, 90, 120, 160])
def test_nothing_is_cut_at_any_width(sweep_folder: Path, width: int) -> None:
    text = printed(sweep_folder, width)
    assert max(len(line) for line in text.splitlines()) <= width
    for wanted in ("streaming_llm", "50 % tokens kept", "MiB", "objects", "[1.001, 1.085]"):
        assert wanted in text
    assert "\u2026" not in text


def test_failed_cells_show_their_status_and_are_counted(tmp_path: Path) -> None:
    write_cell(tmp_path, body())
    write_cell(tmp_path, body(policy="elastic", status="oom"))
    for text in (printed(tmp_path, 150), printed(tmp_path, 70), markdown_tables(load_results(tmp_path))):
        assert "2 cells: 1 ok, 1 oom" in text
        assert "oom" in text.split("1 oom", 1)[1]


def test_a_missing_measurement_is_a_dash(tmp_path: Path) -> None:
    record = body()
    del record["measurements"]["ttft_ms"]
    write_cell(tmp_path, record)
    row = markdown_tables(load_results(tmp_path)).splitlines()[6]
    assert row.split("|")[7].strip() == "-"


def test_markdown_survives_bars_in_names(tmp_path: Path) -> None:
    write_cell(tmp_path, body(policy="a|b"))
    row = markdown_tables(load_results(tmp_path)).splitlines()[6]
    assert row.startswith("| a\\|b | 20 % tokens kept |")


def test_markup_in_names_is_printed_as_it_is(tmp_path: Path) -> None:
    write_cell(tmp_path, body(policy="[red]x[/red]"))
    assert "[red]x[/red]" in printed(tmp_path, 150)


def test_groups_are_kept_apart(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    write_cell(tmp_path, body(model="other"))
    lines = markdown_tables(load_results(tmp_path)).splitlines()
    assert sum(line.startswith("## ") for line in lines) == 2


def test_every_cell_is_compared_with_full_in_terminal_and_markdown(sweep_folder: Path) -> None:
    markdown = markdown_tables(load_results(sweep_folder))
    verdicts = markdown.split("### Compared with full")[1].split("### Policy against policy")[0]
    rows = [line for line in verdicts.splitlines() if line.startswith("| ")][2:]
    assert len(rows) == 2 * 12, "ROUGE-L and TPOT of twelve cells"
    assert any("| worse |" in row for row in rows)
    assert "Holm" in markdown
    for width in (60, 140):
        text = printed(sweep_folder, width)
        assert "Compared with full" in text
        assert "80 %" in text


def test_policies_stand_against_each_other_in_markdown_and_in_a_wide_terminal(
    sweep_folder: Path,
) -> None:
    (matrix,) = markdown_tables(load_results(sweep_folder)).split("### Policy against policy: ")[1:]
    rows = [line for line in matrix.splitlines() if line.startswith("| ")][2:]
    assert len(rows) == 12, "four policies at three budgets, in the leading measure alone"
    wide, narrow = printed(sweep_folder, 140), printed(sweep_folder, 60)
    assert re.search(r"Policy against policy: .* \(higher is better\), 20 % tokens kept", wide)
    assert "Holm's correction over all pairs" in " ".join(wide.split())
    assert "Policy against policy" not in narrow


def test_a_noisy_time_has_no_verdict_and_says_why(tmp_path: Path) -> None:
    record = body()
    record["measurements"]["tpot_spread_fraction"] = {"value": 0.08, "low": None, "high": None, "n": 1, "unit": ""}
    write_cell(tmp_path, body(policy="full", budget=None))
    write_cell(tmp_path, record)
    results = load_results(tmp_path)
    row = next(line for line in markdown_tables(results).splitlines() if "| TPOT / full |" in line)
    assert row.endswith("| noisy |")
    entries = {entry.kind for row in results_table(results.groups[0]).rows for entry in row.entries}
    assert "noisy" in entries
    assert any("spread by 8.0%" in line for note in notes_of(results.groups[0]) for line in note.details)


def test_turns_and_needles_have_columns_where_they_were_measured(tmp_path: Path) -> None:
    record = body()
    number = dict(record["measurements"]["rougeL_vs_full"])
    names = ("turn1_rougeL_vs_full", "turn2_exact_fraction", "turn2_length_ratio", "needles_recalled_fraction")
    record["measurements"] = dict.fromkeys(names, number) | {"num_skipped_items": {"value": 3, "n": 9}}
    write_cell(tmp_path, record)
    header = markdown_tables(load_results(tmp_path)).splitlines()[4]
    columns = [column.strip() for column in header.strip("|").split("|")][2:]
    assert columns == ["needles found", "turn 1: ROUGE-L vs full", "turn 2: exact", "items skipped"]


def test_how_long_a_whole_answer_takes_stands_beside_the_score_of_problems(tmp_path: Path) -> None:
    record = body(policy="h2o")
    ms = {"ttft_ms": (50.0, 48.0, 55.0), "tpot_ms": (10.0, 9.0, 12.0)}
    record["measurements"] = {
        **{name: {"value": value, "low": low, "high": high, "n": 6} for name, (value, low, high) in ms.items()},
        "answers_right_fraction": {"value": 0.5, "low": 0.2, "high": 0.8, "n": 2},
    }
    alone = {"id": "a", "num_new_tokens": 5}
    drawn = {"id": "b", "num_new_tokens": 1, "draws": [{"num_new_tokens": 9}, {"num_new_tokens": 13}]}
    record["samples"] = [{**row, "answers_right_fraction": 0.5} for row in (alone, drawn)]
    record["measurements"]["ttft_spread_fraction"] = {"value": 0.5, "n": 1}
    write_cell(tmp_path, record)
    (group,) = load_results(tmp_path).groups
    columns = results_table(group).columns
    assert columns[0] == "answers_right_fraction"
    assert "answer_ms" in columns
    found = group.cells[0].estimate("answer_ms")
    assert found is not None
    assert (found.value, found.low, found.high, found.n) == (50 + 7 * 10, 48 + 7 * 9, 55 + 7 * 12, 2)  # (5 + 11) / 2
    assert timing_noise(group.cells[0], "answer_ms"), "the first token is a part of it"
    for name, samples in {"none": [], "no length": [{"id": "a", "answers_right_fraction": 0.5}]}.items():
        write_cell(tmp_path / name, {**record, "samples": samples})
        (cell,) = load_results(tmp_path / name).records
        assert cell.estimate("answer_ms") is None


def test_a_score_without_times_and_a_picture_have_no_time_of_an_answer(sweep_folder: Path) -> None:
    assert all(cell.estimate("answer_ms") is None for cell in load_results(sweep_folder).records)


def test_the_length_of_answers_stands_behind_rouge_and_the_tasks_own_measure_first(sweep_folder: Path) -> None:
    (group,) = load_results(sweep_folder).groups
    assert results_table(group).columns[:4] == ("objects_recalled_fraction", "rougeL_vs_full", "length_ratio", "ppl")
    assert {row.measure for row in verdict_rows(group)} == {"objects_recalled_fraction", "tpot_ratio_to_full"}
    heads = verdict_table(judge(group)).heads
    assert heads[3:9] == (
        *("objects recalled", "minus full", "detectable", "collapses", "ROUGE-L vs full", "length / full"),
    )
