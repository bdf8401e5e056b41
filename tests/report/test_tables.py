from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from kvbench.report.load import load_results
from kvbench.report.tables import markdown_tables, print_tables
from tests.report.synthetic import body, write_cell, write_sweep


def printed(folder: Path, width: int) -> str:
    console = Console(width=width, record=True, color_system=None, file=io.StringIO())
    print_tables(load_results(folder), console)
    return console.export_text()


@pytest.mark.parametrize("width", [60, 90, 120, 160])
def test_nothing_is_cut_at_any_width(sweep_folder: Path, width: int) -> None:
    text = printed(sweep_folder, width)
    assert max(len(line) for line in text.splitlines()) <= width
    for wanted in ("streaming_llm", "50 % of seen", "MiB", "objects", "[1.001, 1.085]"):
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
    assert row.startswith("| a\\|b | 20 % of seen |")


def test_markup_in_names_is_printed_as_it_is(tmp_path: Path) -> None:
    write_cell(tmp_path, body(policy="[red]x[/red]"))
    assert "[red]x[/red]" in printed(tmp_path, 150)


def test_groups_are_kept_apart(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    write_cell(tmp_path, body(model="other"))
    assert markdown_tables(load_results(tmp_path)).count("## ") == 2


def costs_of(policy: str, share: float) -> dict[str, Any]:
    record = body(policy=policy)
    kept = {name: entry for name, entry in record["measurements"].items() if name.endswith(("_ms", "_bytes"))}
    shown = {"value": share, "low": share - 0.02, "high": share + 0.02, "n": 6, "unit": "", "method": "t interval"}
    return {**record, "measurements": {**kept, "roof_share_fraction": shown}, "samples": []}


def test_cells_without_quality_show_what_they_cost_and_how_near_the_roof_they_are(tmp_path: Path) -> None:
    write_cell(tmp_path, costs_of("h2o", 0.42))
    write_cell(tmp_path, costs_of("elastic", 0.81))
    text = markdown_tables(load_results(tmp_path))
    assert "of roof" in text
    assert "42.0 % [40.0, 44.0]" in text
    assert "PPL" not in text
    assert "Overhead-bound (under 50% of the memory roof): h2o." in text


def test_nothing_is_called_overhead_bound_above_half_of_the_roof(tmp_path: Path) -> None:
    write_cell(tmp_path, costs_of("elastic", 0.51))
    assert "verhead-bound" not in printed(tmp_path, 150)
