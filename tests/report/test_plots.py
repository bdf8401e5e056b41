from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from kvbench.report.load import load_results
from kvbench.report.plots import draw_plots
from kvbench.report.plots_style import Palette
from tests.report.synthetic import body, write_cell


def drawn(folder: Path) -> dict[str, str]:
    plots = draw_plots(load_results(folder))
    for plot in plots:
        ElementTree.fromstring(plot.svg)
    return {plot.name: plot.svg for plot in plots}


def test_there_are_four_figures_per_model_and_data_set(sweep_folder: Path) -> None:
    assert [name.rpartition("-")[2] for name in drawn(sweep_folder)] == ["quality", "pareto", "latency", "memory"]


def test_figures_are_the_same_bytes_every_time(sweep_folder: Path) -> None:
    assert drawn(sweep_folder) == drawn(sweep_folder)


def test_names_that_differ_in_odd_characters_get_different_files(tmp_path: Path) -> None:
    write_cell(tmp_path, body(model="a/b"))
    write_cell(tmp_path, body(model="a b"))
    assert len(drawn(tmp_path)) == 8


@pytest.mark.parametrize("status", ["ok", "oom", "noisy"])
@pytest.mark.parametrize("policy", ["full", "h2o"])
def test_one_cell_is_enough(tmp_path: Path, policy: str, status: str) -> None:
    write_cell(tmp_path, body(policy=policy, budget=None if policy == "full" else 0.2, status=status))
    assert len(drawn(tmp_path)) == 4


def test_every_measurement_may_be_missing(tmp_path: Path) -> None:
    full = body(policy="full", budget=None)
    for name in list(full["measurements"]):
        record = body(policy=f"without-{name}")
        del record["measurements"][name]
        write_cell(tmp_path, record)
    full["measurements"] = {}
    write_cell(tmp_path, full)
    assert len(drawn(tmp_path)) == 4


def test_budgets_in_tokens_and_mixed_budgets_are_drawn(tmp_path: Path) -> None:
    for tokens in (16, 64, 256):
        write_cell(tmp_path, body(budget=None, budget_tokens=tokens) | {"status": "ok"})
    assert len(drawn(tmp_path)) == 4
    write_cell(tmp_path, body(budget=0.2))
    assert len(drawn(tmp_path)) == 4


def test_a_perplexity_that_explodes_is_drawn(tmp_path: Path) -> None:
    for budget, value in ((0.1, 4e5), (0.5, 1.2)):
        record = body(budget=budget)
        record["measurements"]["ppl"] |= {"value": value, "low": value / 2, "high": value * 2}
        write_cell(tmp_path, record)
    assert len(drawn(tmp_path)) == 4


def test_a_policy_looks_the_same_whatever_else_is_drawn() -> None:
    assert Palette(["h2o"]).mark("h2o") == Palette(["full", "h2o", "zebra"]).mark("h2o")
    many = Palette(["full", "random", "h2o", "elastic", "streaming_llm", *"abcdefgh"])
    looks = {(many.mark(name).colour, many.mark(name).marker) for name in "abcdefgh"}
    assert len(looks) == 8
