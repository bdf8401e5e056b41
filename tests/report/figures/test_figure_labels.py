"""Names beside what they name never overlap, as vectors and as pixels."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from kvbench.report.figures import FIGURES
from kvbench.report.figures.draw import draw_pngs, png_names
from kvbench.report.figures.labels import Box, place, spread
from kvbench.report.load import load_results
from tests.covering import share_of
from tests.report.synthetic import body, write_cell

PLACES = st.floats(-50, 250)
COLUMN = st.lists(st.tuples(PLACES, st.floats(1, 12)), max_size=12)
SPOTS = st.lists(st.tuples(st.floats(0, 300), st.floats(0, 200)), max_size=8)
SIZES = st.tuples(st.floats(5, 60), st.floats(5, 12))


@given(COLUMN)
def test_labels_of_a_column_stay_inside_and_apart_and_in_order(column: list[tuple[float, float]]) -> None:
    wanted, heights = [y for y, _ in column], [h for _, h in column]
    centres = spread(wanted, heights, 0.0, 200.0)
    if sum(heights) > 200:
        assert centres is None
        return
    assert centres is not None
    for centre, height in zip(centres, heights, strict=True):
        assert centre - height / 2 >= -1e-6
        assert centre + height / 2 <= 200 + 1e-6
    order = sorted(range(len(column)), key=lambda i: wanted[i])
    for lower, upper in itertools.pairwise(order):
        assert centres[upper] - centres[lower] >= (heights[upper] + heights[lower]) / 2 - 1e-6


@given(st.lists(st.floats(0, 100), min_size=2, max_size=5))
@settings(max_examples=share_of(40), deadline=None)
def test_a_column_moves_its_labels_as_little_as_possible(wanted: list[float]) -> None:
    """Against a general solver on the same problem."""
    wanted = sorted(wanted)
    found = spread(wanted, [12.0] * len(wanted), 0.0, 100.0)
    assert found is not None
    apart = [{"type": "ineq", "fun": lambda y, i=i: y[i + 1] - y[i] - 12} for i in range(len(wanted) - 1)]
    start = [6 + 12.0 * i for i in range(len(wanted))]
    best = minimize(lambda y: sum((y - wanted) ** 2), start, constraints=apart, bounds=[(6, 94)] * len(wanted))
    assert sum((a - b) ** 2 for a, b in zip(found, wanted, strict=True)) <= best.fun * (1 + 1e-4) + 1e-3


@given(COLUMN.filter(lambda column: sum(height for _, height in column) < 60))
def test_labels_that_have_room_stay_where_they_want_to_be(column: list[tuple[float, float]]) -> None:
    wanted = [20.0 * i + 20 for i in range(len(column))]
    heights = [height for _, height in column]
    assert spread(wanted, heights, -1000.0, 1000.0) == wanted


@given(st.lists(st.tuples(SPOTS.filter(bool).map(lambda spots: spots[0]), SIZES), max_size=10), SPOTS)
@settings(deadline=None)
def test_boxes_cover_neither_each_other_nor_obstacles_and_stay_inside(
    labels: list[tuple[tuple[float, float], tuple[float, float]]], spots: list[tuple[float, float]]
) -> None:
    obstacles = [Box(x - 4, y - 4, x + 4, y + 4) for x, y in spots]
    bounds = Box(0, 0, 300, 200)
    boxes = place([a for a, _ in labels], [s for _, s in labels], obstacles, bounds, gap=5.0)
    placed = [box for box in boxes if box]
    assert len(boxes) == len(labels)
    assert not any(one.overlaps(two) for one, two in itertools.combinations(placed, 2))
    assert not any(box.overlaps(obstacle) for box in placed for obstacle in obstacles)
    for box, (_, (width, height)) in zip(boxes, labels, strict=True):
        if box:
            assert box.within(bounds)
            assert abs(box.right - box.left - width) < 1e-6
            assert abs(box.top - box.bottom - height) < 1e-6


CROWD = st.lists(
    st.tuples(st.tuples(st.floats(5, 75), st.floats(5, 35)), st.tuples(st.floats(4, 40), st.floats(4, 16))),
    min_size=4,
    max_size=9,
)


@pytest.mark.long
@given(CROWD)
@settings(deadline=None, max_examples=share_of(300))
def test_labels_that_make_room_for_each_other_in_a_crowd_stay_apart(
    labels: list[tuple[tuple[float, float], tuple[float, float]]],
) -> None:
    boxes = place([a for a, _ in labels], [s for _, s in labels], [], Box(0, 0, 80, 40), gap=2.0)
    placed = [box for box in boxes if box]
    assert placed
    assert not any(one.overlaps(two) for one, two in itertools.combinations(placed, 2))


@given(SIZES)
def test_a_lone_label_stands_right_above_its_point(size: tuple[float, float]) -> None:
    (box,) = place([(150.0, 100.0)], [size], [], Box(0, 0, 300, 200), gap=5.0)
    assert box is not None
    assert abs(box.bottom - 105.0) < 1e-6
    assert abs((box.left + box.right) / 2 - 150.0) < 1e-6


def test_a_label_without_any_place_is_left_out() -> None:
    assert place([(5, 5)], [(20, 20)], [], Box(0, 0, 10, 10), gap=1.0) == [None]


def test_a_blocking_label_gives_way() -> None:
    wall = [Box(0, 0, 40, 4), Box(0, 16, 40, 20)]
    alone = place([(20, 10)], [(4, 4)], wall, Box(0, 0, 40, 20), gap=2.0)
    both = place([(20, 10), (20, 10)], [(4, 4), (14, 11)], wall, Box(0, 0, 40, 20), gap=2.0)
    assert alone[0] is not None
    assert both[0] is not None
    assert both[1] is not None
    assert not both[0].overlaps(both[1])


@pytest.mark.long
@pytest.mark.parametrize(
    "kinds", [("quality", "capacity", "memory"), pytest.param(tuple(FIGURES), marks=pytest.mark.long)]
)
def test_every_figure_that_has_data_is_a_png_with_its_caption(
    tmp_path: Path, kinds: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvbench.report.figures.draw.FIGURES", {kind: FIGURES[kind] for kind in kinds})
    for policy, budget in (("full", None), ("h2o", 0.2), ("random", 0.2)):
        write_cell(tmp_path, body(policy=policy, budget=budget, num_samples=8))
    results = load_results(tmp_path)
    drawn = list(draw_pngs(results))
    assert [png.name for png in drawn] == png_names(results)
    assert len(drawn) == (2 if len(kinds) == 3 else 6)
    for one in drawn:
        assert one.data.startswith(b"\x89PNG")
        assert one.caption.startswith("tiny-llava on scenes: ")
