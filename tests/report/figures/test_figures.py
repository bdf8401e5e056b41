from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import warnings
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from matplotlib.colors import to_hex
from matplotlib.text import Text

from kvbench.report.figures import FIGURES, FORMATS, WIDTHS
from kvbench.report.figures.draw import DRAW, Row, draw_plots, forest_svg
from kvbench.report.figures.labels import Box
from kvbench.report.figures.style import BUNDLED, COLOUR_NAMES, FAILED, LIGHT, OTHERS
from kvbench.report.load import load_results
from tests.covering import one_in
from tests.report.figures.figure_data import draw, drawn_once, plots_of, svg_of, texts
from tests.report.synthetic import body, write_cell, write_sweep

RECALL = "objects_recalled_fraction"
REPO = Path(__file__).parents[3]
IN_A_SWEEP = ["quality", "pareto", "latency", "memory", "entries", "differences"]
EVERY_FORMAT = """
import hashlib, sys
from pathlib import Path
from kvbench.report.figures import FIGURES, FORMATS
from kvbench.report.load import load_results
from kvbench.report.figures.draw import draw_one
from kvbench.report.figures.style import Palette
from kvbench.report.figures.style import Look
results = load_results(Path(sys.argv[1]))
for kind in FIGURES.values():
    for file_format in FORMATS if kind.name in ("quality", "memory") else FORMATS[:1]:
        drawn = draw_one(kind, results.groups[0], Look(palette=Palette(results.policies), width="single"), file_format)
        print(kind.name, file_format, drawn and hashlib.sha256(drawn).hexdigest())
"""
ODD_SETTINGS = "font.size: 23\nfont.family: serif\nlines.linewidth: 9\naxes.grid: False\nsvg.fonttype: none\n"


def drawn(folder: Path) -> dict[str, str]:
    plots = plots_of(folder)
    for plot in plots:
        ElementTree.fromstring(plot.svg)
        assert plot.caption
        assert plot.title
    return {plot.name.rpartition("-")[2]: plot.svg for plot in plots}


def digests(folder: Path, here: Path, seed: str) -> list[str]:
    """Return a line per figure and format, drawn in a process of its own that starts in the folder `here`."""
    environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(REPO)}
    command = [sys.executable, "-c", EVERY_FORMAT, str(folder)]
    done = subprocess.run(command, env=environment, cwd=here, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_every_figure_that_is_listed_can_be_drawn() -> None:
    assert list(FIGURES) == list(DRAW)


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.long)])
def test_figures_with_data_are_drawn_in_order(sweep_folder: Path, whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if whole:
        assert list(drawn(sweep_folder)) == IN_A_SWEEP
        return
    monkeypatch.setattr("kvbench.report.figures.draw.figure_bytes", lambda *words: b"<svg/>")  # saving takes longest
    assert [plot.kind for plot in draw_plots(load_results(sweep_folder))] == IN_A_SWEEP


@pytest.mark.long
def test_another_process_hash_seed_and_matplotlibrc_give_the_same_bytes(tmp_path: Path) -> None:
    few, odd = tmp_path / "few", tmp_path / "odd"
    for policy, budget in (("full", None), ("h2o", 0.1), ("h2o", 0.2), ("mine", 0.2)):
        write_cell(few, body(policy=policy, budget=budget))
    odd.mkdir()
    (odd / "matplotlibrc").write_text(ODD_SETTINGS)
    first = digests(few, tmp_path, "1")
    assert first == digests(few, odd, "2")
    assert len([line for line in first if not line.endswith("None")]) == len(IN_A_SWEEP) + 2 * (len(FORMATS) - 1)


def test_names_that_differ_in_odd_characters_get_different_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvbench.report.figures.draw.draw_one", lambda *words: b"<svg/>")
    write_cell(tmp_path, body(model="a/b"))
    write_cell(tmp_path, body(model="a b"))
    names = [plot.name for plot in draw_plots(load_results(tmp_path))]
    assert len(set(names)) == len(names) == 2 * len(FIGURES)


@pytest.mark.cover("one")
@pytest.mark.parametrize("status", ["ok", "oom", "noisy"])
@pytest.mark.parametrize("policy", ["full", "h2o"])
def test_one_cell_is_enough(tmp_path: Path, policy: str, status: str) -> None:
    write_cell(tmp_path, body(policy=policy, budget=None if policy == "full" else 0.2, status=status))
    found = list(drawn(tmp_path))
    if status == "oom":
        assert found == []
    else:
        assert found == (["pareto", "latency", "memory"] if policy == "full" else IN_A_SWEEP[:-1])


@pytest.mark.long
def test_every_measurement_may_be_missing(tmp_path: Path) -> None:
    full = body(policy="full", budget=None)
    for name in list(full["measurements"]):
        record = body(policy=f"without-{name}")
        del record["measurements"][name]
        write_cell(tmp_path, record)
    full["measurements"] = {}
    write_cell(tmp_path, full)
    assert list(drawn(tmp_path)) == IN_A_SWEEP


@pytest.mark.parametrize("curves", [{}, {"entries": []}, {"entries": [[1, 2]]}, {"entries": "x"}])
def test_a_record_without_a_usable_curve_has_no_figure_of_it(tmp_path: Path, curves: dict[str, object]) -> None:
    write_cell(tmp_path, body() | {"curves": curves})
    assert svg_of(tmp_path, "entries") is None


@pytest.mark.long
def test_budgets_in_tokens_and_mixed_budgets_are_drawn(tmp_path: Path) -> None:
    for tokens in (16, 64, 256):
        write_cell(tmp_path, body(budget=None, budget_tokens=tokens) | {"status": "ok"})
    draw(tmp_path, "quality")
    write_cell(tmp_path, body(budget=0.2))
    assert svg_of(tmp_path, "quality")


def test_a_perplexity_that_explodes_is_drawn(tmp_path: Path) -> None:
    for budget, value in ((0.1, 4e5), (0.5, 1.2)):
        record = body(budget=budget)
        record["measurements"]["ppl"] |= {"value": value, "low": value / 2, "high": value * 2}
        write_cell(tmp_path, record)
    _, figure = draw(tmp_path, "quality", measures=("ppl",))
    assert figure.axes[0].get_yscale() == "log"


@pytest.mark.long
def test_failed_and_noisy_cells_are_marked(tmp_path: Path) -> None:
    write_cell(tmp_path, body(policy="full", budget=None))
    write_cell(tmp_path, body(policy="h2o", status="oom"))
    write_cell(tmp_path, body(policy="elastic", status="noisy"))
    _, quality = draw(tmp_path, "quality")
    assert "oom" in texts(quality)
    assert any(line.get_label() == "failed: h2o, 20 % tokens kept" for line in quality.axes[0].lines)
    for name in ("latency", "pareto"):
        _, figure = draw(tmp_path, name)
        said = [text.get_text() for text in figure.findobj(Text)]
        assert sum("noisy" in text for text in said) == 1, f"{name} says it once"
    assert "oom" in texts(draw(tmp_path, "latency")[1])
    assert "oom" in texts(draw(tmp_path, "memory")[1])


def test_a_noisy_cell_is_never_on_the_front_over_time(tmp_path: Path) -> None:
    write_cell(tmp_path, body(policy="full", budget=None))
    record = body(policy="h2o", status="noisy")
    record["measurements"]["tpot_ms"] |= {"value": 0.1, "low": 0.1, "high": 0.1}
    write_cell(tmp_path, record)
    _, figure = draw(tmp_path, "pareto", measures=("ppl",))
    by_bytes, by_time = ([len(line.get_xdata()) for line in axes.lines if line.get_label() == "front"]
                         for axes in figure.axes)  # fmt: skip
    assert (by_bytes, by_time) == ([2], [1])


@pytest.mark.parametrize("name", one_in(3, IN_A_SWEEP))
def test_a_figure_for_a_column_is_at_most_four_inches_high(sweep_folder: Path, name: str) -> None:
    _, figure = draw(sweep_folder, name, width="single")
    width, height = figure.get_size_inches()
    assert (width, height <= 4.0) == (3.4, True)


def test_of_very_many_policies_the_best_have_colours_and_names_and_the_rest_is_grey(tmp_path: Path) -> None:
    write_cell(tmp_path, body(policy="full", budget=None))
    for index in range(20):
        for budget in (0.1, 0.2):
            write_cell(tmp_path, body(policy=f"policy_{index:02}", budget=budget))
    group, figure = draw(tmp_path, "quality", measures=("ppl",))
    lines_by_name = {str(line.get_label()): line for line in figure.axes[0].lines}
    grey = {name for name, line in lines_by_name.items() if line.get_color() == LIGHT.grid}
    assert len(grey) == 14
    best = sorted(group.by_budget["20 % tokens kept"], key=lambda cell: -cell.measurements[RECALL].value)[:6]
    assert not grey & {f"ppl: {cell.policy}" for cell in best}, "the best in what leads"
    assert not figure.legends
    assert {text for text in texts(figure) if text.startswith("policy")} == {cell.policy for cell in best}


@pytest.mark.long
def test_many_policies_with_long_names_leave_room_for_the_panels(tmp_path: Path) -> None:
    for index in range(24):
        write_cell(tmp_path, body(policy=f"a_policy_with_a_name_as_long_as_those_of_variants_{index:02}"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, figure = draw(tmp_path, "quality")
    assert all(axes.get_window_extent().height > 100 for axes in figure.axes if axes.get_visible())


def test_what_failed_has_a_mark_that_no_policy_has(tmp_path: Path) -> None:
    markers = {shape.marker for shape in (*BUNDLED.values(), *OTHERS)}
    assert FAILED not in markers
    write_cell(tmp_path, body(policy="full", budget=None))
    write_cell(tmp_path, body(policy="h2o", status="oom"))
    _, figure = draw(tmp_path, "quality")
    failed = [line for line in figure.axes[0].lines if str(line.get_label()).startswith("failed")]
    assert {line.get_marker() for line in failed} == {FAILED}


def test_the_parts_of_memory_have_no_colour_of_a_policy(sweep_folder: Path) -> None:
    _, figure = drawn_once(sweep_folder, "memory")
    colours = {getattr(LIGHT, shape.colour) for shape in (*BUNDLED.values(), *OTHERS) if shape.colour != "ink"}
    bars = [patch for patch in figure.axes[0].patches if patch.get_width() > 0]
    assert bars
    assert not {to_hex(patch.get_facecolor()) for patch in bars} & colours


@pytest.mark.cover("one")
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["quality", "pareto", "entries"])
def test_labels_cover_neither_each_other_nor_leave_the_figure(sweep_folder: Path, name: str, width: str) -> None:
    _, figure = draw(sweep_folder, name, width=width)
    assert figure.get_size_inches()[0] == WIDTHS[width][0]
    for axes in (axes for axes in figure.axes if axes.get_visible()):
        found = [text.get_window_extent() for text in axes.texts if text.get_visible() and text.get_text()]
        boxes = [Box(box.x0, box.y0 + 0.5, box.x1, box.y1 - 0.5) for box in found]
        assert len(boxes) >= 3
        assert not any(one.overlaps(two) for one, two in itertools.combinations(boxes, 2))
        assert all(box.left >= 0 and box.right <= figure.bbox.width for box in boxes)


@pytest.mark.long
def test_a_legend_takes_over_where_names_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvbench.report.figures.style.MANY", 100)
    for index in range(40):
        write_cell(tmp_path, body(policy=f"policy_{index:02}"))
    _, figure = draw(tmp_path, "quality", measures=("ppl",), width="single")
    assert len(figure.legends[0].get_texts()) == 40
    _, small = draw(write_sweep(tmp_path / "small"), "quality")
    assert not small.legends


def test_a_policy_looks_the_same_in_a_figure_of_some_policies(sweep_folder: Path) -> None:
    _, figure = draw(sweep_folder, "quality", measures=("ppl",))
    colours = {line.get_label(): line.get_color() for line in figure.axes[0].lines}
    assert colours["ppl: h2o"] == LIGHT.blue
    assert colours["ppl: elastic"] == LIGHT.green


@pytest.mark.long
@pytest.mark.parametrize(
    "name", [IN_A_SWEEP[0], *(pytest.param(one, marks=pytest.mark.long) for one in IN_A_SWEEP[1:])]
)
def test_only_colours_of_the_theme_are_used(sweep_folder: Path, name: str) -> None:
    """Colours that mean something are chosen in one place."""
    for svg in (svg_of(sweep_folder, name) or "",):
        used = {svg[i : i + 7] for i in range(len(svg)) if svg[i] == "#" and svg[i + 1 : i + 7].isalnum()}
        used = {colour for colour in used if len(colour) == 7 and set(colour[1:]) <= set("0123456789abcdef")}
        assert used <= set(COLOUR_NAMES)
        assert LIGHT.ink in used


@pytest.mark.long
def test_names_of_users_are_text_and_never_mathematics(tmp_path: Path) -> None:
    write_cell(tmp_path, body(policy="a$b_$c$"))
    write_cell(tmp_path, body(policy="full", budget=None))
    _, figure = draw(tmp_path, "quality", measures=("ppl",))
    assert "a$b_$c$" in texts(figure)
    assert not any(text.get_parse_math() for axes in figure.axes for text in axes.texts)
    assert svg_of(tmp_path, "quality")


def test_a_wide_scale_of_a_forest_is_labelled_by_numbers() -> None:
    rows = {"near": Row(value=0.05, low=0.04, high=0.06), "far": Row(value=2.0, low=1.9, high=2.1)}
    rows |= {f"other {number}": Row(value=0.05, low=None, high=None) for number in range(3)}
    drawn = forest_svg(list(rows), {"panel": rows}, label="nats per token").decode()
    assert "mathdefault" not in drawn
    assert {"0.1", "1"} <= set(re.findall(r"<!-- ([\d.]+) -->", drawn))  # what paths of glyphs spell


@pytest.mark.parametrize("middle", [0.013, 0.025, 0.064, 0.09])
def test_labels_of_a_wide_scale_stand_apart(middle: float) -> None:
    rows = {f"row {number}": Row(value=middle, low=None, high=None) for number in range(5)}
    rows |= {"far": Row(value=2.2, low=2.1, high=2.4), "less": Row(value=-0.2, low=-0.3, high=-0.1)}
    drawn = forest_svg(list(rows), dict.fromkeys(("one", "two", "three"), rows), label="nats per token").decode()
    found = re.findall(r"<!-- ([-\d.]+) -->\s*<g [^>]*translate\(([\d.]+) ", drawn)
    assert {"0", "0.1", "1"} <= {label for label, _ in found}
    starts = [(label, float(start)) for label, start in found]
    for (label, start), (other, following) in itertools.pairwise(sorted(starts, key=lambda one: one[1])):
        assert following - start > 5.5 * len(label), f"{label} touches {other}"
