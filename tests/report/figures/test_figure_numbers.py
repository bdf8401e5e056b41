"""Every number in a figure is the record's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import rc_context

from kvbench.measures import measure
from kvbench.report.figures import FIGURES
from kvbench.report.figures.draw import draw_plots, palette_of
from kvbench.report.figures.pareto import Point, frontier_figure, pareto_front
from kvbench.report.figures.style import Look, axis_scale, budget_axis
from kvbench.report.load import CellResult, load_results
from kvbench.results.frontier import Frontier, Search
from kvbench.results.frontier import Look as BudgetLook
from tests.report.figures.figure_data import bars, corners, draw, drawn_once, lines, texts
from tests.report.synthetic import body, write_cell

LATENCIES = ("ttft_ms", "tpot_ms", "tpot_p90_ms", "roof_share_fraction", "tpot_ratio_to_full", "ttft_ratio_to_full")
QUALITIES = ("rougeL_vs_full", "objects_recalled_fraction", "ppl", "rougeL_vs_reference", "kl_to_full")


def value_of(cell: CellResult, name: str) -> float:
    return cell.measurements[name].value


@pytest.mark.parametrize("name", QUALITIES)
def test_quality_lines_and_bands_are_the_records(sweep_folder: Path, name: str) -> None:
    group, figure = drawn_once(sweep_folder, "quality")
    factor = axis_scale(name, group.cells).factor
    places = budget_axis(group.budgeted).places
    for label, cells in group.by_series().items():
        (points,) = lines(figure, f"{name}: {label}")
        wanted = [value_of(cell, name) / factor for cell in cells]
        if cells[0].is_full:
            assert set(points[:, 1]) == set(wanted)
            continue
        assert points[:, 1].tolist() == wanted
        assert points[:, 0].tolist() == [places[cell.key] for cell in cells]
        bounds = {bound / factor for cell in cells for bound in cell.measurements[name].bounds}
        assert bounds <= set(corners(figure, f"{name}: {label}")[:, 1])


@pytest.mark.parametrize("cost", ["kv_stored_bytes", "tpot_ms"])
def test_pareto_points_intervals_and_front_are_the_records(sweep_folder: Path, cost: str) -> None:
    group, figure = drawn_once(sweep_folder, "pareto", measures=("ppl",))
    across = axis_scale(cost, group.cells).factor
    points = [Point(cell=c, cost=c.measurements[cost], quality=c.measurements["ppl"]) for c in group.cells]
    for point in points:
        label = f"ppl over {cost}: {group.cell_label(point.cell)}"
        ((place,),) = (found.tolist() for found in lines(figure, label))
        assert place == [point.cost.value / across, point.quality.value]
        found = corners(figure, label)
        assert {*point.quality.bounds} <= set(found[:, 1])
        assert {bound / across for bound in point.cost.bounds} <= set(found[:, 0])
    front = [[p.cost.value / across, p.quality.value] for p in pareto_front(points, "ppl")]
    assert front in [found.tolist() for found in lines(figure, "front")]


@pytest.mark.parametrize("name", ["rougeL_vs_full", "ppl"])
def test_the_front_is_what_no_other_cell_beats(sweep_folder: Path, name: str) -> None:
    group, _ = drawn_once(sweep_folder, "pareto")
    points = [Point(cell=c, cost=c.measurements["tpot_ms"], quality=c.measurements[name]) for c in group.cells]
    sign = 1 if measure(name).better == "higher" else -1

    def beaten(point: Point) -> bool:
        return any(
            other.cost.value <= point.cost.value and sign * other.quality.value > sign * point.quality.value
            for other in points
        )

    assert {p.cell.key for p in pareto_front(points, name)} == {p.cell.key for p in points if not beaten(p)}


@pytest.mark.parametrize("name", LATENCIES)
def test_latencies_are_the_records(sweep_folder: Path, name: str) -> None:
    group, figure = drawn_once(sweep_folder, "latency")
    factor = axis_scale(name, group.cells).factor
    for row, cell in enumerate(group.cells):
        label = f"{name}: {group.cell_label(cell)}"
        ((place,),) = (found.tolist() for found in lines(figure, label))
        assert place[0] == value_of(cell, name) / factor
        assert abs(place[1] - row) < 0.5
        assert {bound / factor for bound in cell.measurements[name].bounds} <= set(corners(figure, label)[:, 0])


def test_parts_of_a_latency_are_the_records(sweep_folder: Path) -> None:
    group, figure = drawn_once(sweep_folder, "latency")
    for cell in group.cells:
        for name in ("settle_ms", "policy_ms"):
            assert bars(figure, f"{name}: {group.cell_label(cell)}") == [(0.0, value_of(cell, name))]
        assert value_of(cell, "roof_ms") in corners(figure, f"roof_ms: {group.cell_label(cell)}")[:, 0]


def test_the_parts_of_a_peak_stand_end_to_end_and_sum_to_it(sweep_folder: Path) -> None:
    group, figure = drawn_once(sweep_folder, "memory")
    factor = axis_scale("peak_memory_bytes", group.cells).factor
    for cell in group.cells:
        end = 0.0
        for name in ("peak_load_bytes", "plain_activation_bytes", "kv_stored_bytes", "rest"):
            start, width = bars(figure, f"{name}: {group.cell_label(cell)}")[0]
            assert start == pytest.approx(end)
            if name != "rest":
                assert width == pytest.approx(value_of(cell, name) / factor)
            end = start + width
        assert end == pytest.approx(value_of(cell, "peak_memory_bytes") / factor)
        peak = corners(figure, f"peak_memory_bytes: {group.cell_label(cell)}")
        assert peak[0, 0] == pytest.approx(value_of(cell, "peak_memory_bytes") / factor)


def test_parts_that_were_not_alive_at_once_leave_the_peak_inside_the_bar(tmp_path: Path) -> None:
    record = body()
    record["measurements"]["plain_activation_bytes"]["value"] *= 3
    write_cell(tmp_path, record)
    group, figure = draw(tmp_path, "memory")
    assert bars(figure, f"rest: {group.cell_label(group.cells[0])}")[0][1] == 0.0


def test_phases_and_kv_bytes_are_the_records(sweep_folder: Path) -> None:
    group, figure = drawn_once(sweep_folder, "memory")
    kib = axis_scale("kv_stored_bytes", group.cells).factor
    for cell in group.cells:
        label = group.cell_label(cell)
        for phase in ("vision", "prefill", "settle", "decode"):
            name = f"peak_{phase}_bytes"
            above = value_of(cell, name) - value_of(cell, "peak_load_bytes")
            assert lines(figure, f"{name}: {label}")[0][0, 0] == pytest.approx(above / 2**20)
        widths = [width for _, width in bars(figure, f"kv_stored_bytes: {label}")]
        assert widths[-1] == value_of(cell, "kv_stored_bytes") / kib
        tick = lines(figure, f"kv_theoretical_bytes: {label}")[0]
        assert tick[0, 0] == value_of(cell, "kv_theoretical_bytes") / kib


def test_entries_are_the_curves_of_the_records(sweep_folder: Path) -> None:
    group, figure = drawn_once(sweep_folder, "entries")
    for cell in group.cells:
        curve = np.asarray(cell.curves["entries"])
        drawn = lines(figure, f"entries: {group.cell_label(cell)}")
        assert len(drawn) == (4 if cell.is_full else 1)
        for found in drawn:
            np.testing.assert_array_equal(found, curve[:, :2])
        assert set(curve[:, 2]) <= set(corners(figure, f"entries: {group.cell_label(cell)}")[:, 1])


@pytest.mark.parametrize("name", ["rougeL_vs_full", "ppl"])
def test_differences_are_those_of_the_samples(sweep_folder: Path, name: str) -> None:
    group, figure = drawn_once(sweep_folder, "differences", measures=(name,))
    assert group.full is not None

    def scores(cell: CellResult) -> dict[str, float]:
        if name == "ppl":
            return {sample["id"]: sample["nll_sum"] / sample["num_scored_tokens"] for sample in cell.samples}
        return {sample["id"]: sample[name] for sample in cell.samples}

    full, loss = scores(group.full), dict.fromkeys(scores(group.full), 0.0)
    for cell in group.budgeted:
        for sample, score in scores(cell).items():
            loss[sample] += (score - full[sample]) * (-1 if name == "ppl" else 1)
    order = sorted(loss, key=lambda sample: (loss[sample], sample))
    for cell in group.budgeted:
        wanted = [scores(cell)[sample] - full[sample] for sample in order]
        dots, shares = lines(figure, f"{name}: {group.cell_label(cell)}")
        np.testing.assert_allclose(dots[:, 1], wanted, atol=1e-12)
        np.testing.assert_allclose(shares[1:, 0], sorted(wanted), atol=1e-12)
        np.testing.assert_allclose(shares[1:, 1], 100 * np.arange(1, 33) / 32)


def test_throughput_and_capacity_are_the_records(tmp_path: Path) -> None:
    for policy, largest in (("full", 12), ("h2o", 40)):
        record = body(policy=policy, budget=None if policy == "full" else 0.2)
        record["cell"]["task"] = {"speed": {"batch_size": 4}}
        entry = record["measurements"]["ttft_ms"]
        for name, value in (
            ("throughput_tokens_per_s", 100.0 + largest),
            ("capacity_prompts", float(largest)),
            ("capacity_throughput_tokens_per_s", 30.0 * largest),
        ):
            record["measurements"][name] = entry | {"value": value, "low": value - 1, "high": value + 1}
        write_cell(tmp_path, record)
    _, figure = draw(tmp_path, "capacity")
    (points,) = lines(figure, "throughput_tokens_per_s: h2o, 20 %")
    assert points.tolist() == [[4.0, 140.0], [40.0, 1200.0]]
    assert {139.0, 141.0, 1199.0, 1201.0} == set(corners(figure, "throughput_tokens_per_s: h2o, 20 %")[:, 1])
    assert lines(figure, "capacity_prompts: h2o")[0].tolist() == [[0.0, 40.0]]
    assert set(lines(figure, "capacity_prompts: full")[0][:, 1]) == {12.0}


def test_a_frontier_is_what_its_file_says(sweep_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = load_results(sweep_folder).groups[0].full
    assert full is not None
    key = full.key
    found = search("h2o", 0.2, low=0.1, looks=((0.5, "safe"), (0.1, "worse"), (0.2, "safe")), full_key=key)
    none = search("elastic", None, low=0.4, looks=((0.5, "undecided"),), full_key=key)
    beyond = search("snapkv", None, low=None, looks=((0.5, "worse"),), full_key=key)
    beyond = replace(beyond, status="not monotone")
    other = search("random", 0.5, low=0.5, looks=(), full_key="another")
    frontier = Frontier(
        name="f", measure="ppl", margin=0.05, ladder=(0.1, 0.2, 0.5), budget_setting="fraction", confidence=0.98,
        num_cells=3, num_cells_of_grid=6, searches=(found, none, beyond, other),
    )  # fmt: skip
    results = replace(load_results(sweep_folder), frontiers=(frontier,))
    look = Look(palette=palette_of(results), frontiers=(frontier,))
    with rc_context(look.rc):
        figure = frontier_figure(results.groups[0], look)
        assert frontier_figure(results.groups[0], Look(palette=look.palette)) is None
        assert frontier_figure(results.groups[0], replace(look, measures=("rougeL_vs_full",))) is None
    assert figure is not None
    monkeypatch.setattr(
        "kvbench.report.figures.draw.FIGURES", {kind: FIGURES[kind] for kind in ("frontier", "capacity")}
    )
    assert [plot.kind for plot in draw_plots(results)] == ["frontier"]
    assert lines(figure, "smallest_safe: h2o")[0][0, 0] == 20.0
    assert corners(figure, "smallest_safe: h2o")[:, 0].tolist() == [10.0, 20.0]
    assert lines(figure, "smallest_safe: elastic") == []
    assert corners(figure, "smallest_safe: elastic")[:, 0].tolist() == [40.0, 50.0]
    assert len(corners(figure, "smallest_safe: snapkv")) == 0, "the true one lies above the ladder"
    assert lines(figure, "safe: h2o")[0][:, 0].tolist() == [50.0, 20.0]
    assert lines(figure, "worse: h2o")[0][:, 0].tolist() == [10.0]
    assert texts(figure) == {"20 % (holds 46 %)", "above 50 %", "above 50 %, not monotone"}


def test_a_frontier_belongs_to_the_group_of_its_cells_whatever_that_is_called(tmp_path: Path) -> None:
    for num in (32, 64):
        for policy, budget in (("full", None), ("h2o", 0.2)):
            record = body(policy=policy, budget=budget, seed=num)
            record["cell"]["dataset"] = {"num_samples": num}
            write_cell(tmp_path, record)
    results = load_results(tmp_path)
    assert [group.dataset for group in results.groups] == ["scenes num_samples=32", "scenes num_samples=64"]
    full = results.groups[1].full
    assert full is not None
    found = replace(search("h2o", 0.2, low=0.1, looks=((0.2, "safe"),)), full_key=full.key)
    frontier = Frontier(
        name="f", measure="ppl", margin=0.05, ladder=(0.1, 0.2), budget_setting="fraction", confidence=0.98,
        num_cells=2, num_cells_of_grid=3, searches=(found,),
    )  # fmt: skip
    look = Look(palette=palette_of(results), frontiers=(frontier,))
    with rc_context(look.rc):
        assert [frontier_figure(group, look) is not None for group in results.groups] == [False, True]


def search(
    policy: str,
    smallest: float | None,
    *,
    low: float | None,
    looks: tuple[tuple[float, Any], ...],
    full_key: str = "k",
) -> Search:
    return Search(
        model="tiny-llava", dataset="scenes", policy=policy, positions="original", policy_settings={},
        full_key=full_key, status="found" if smallest else "no budget shown safe",
        smallest_safe=smallest, budget_low=low,
        looks=tuple(
            BudgetLook(budget=budget, outcome=outcome, num_samples=32, realised_budget=2.3 * budget)
            for budget, outcome in looks
        ),
    )  # fmt: skip
