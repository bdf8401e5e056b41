from __future__ import annotations

from pathlib import Path

from kvbench.report.load import load_results
from kvbench.report.plots_png import draw_pngs, png_names
from tests.report.synthetic import body, write_cell


def test_every_figure_that_has_data_is_a_png_with_its_caption(tmp_path: Path) -> None:
    for policy, budget in (("full", None), ("h2o", 0.2), ("random", 0.2)):
        write_cell(tmp_path, body(policy=policy, budget=budget, num_samples=8))
    results = load_results(tmp_path)
    drawn = list(draw_pngs(results))
    assert [png.name for png in drawn] == png_names(results)
    assert len(drawn) >= 4
    for one in drawn:
        assert one.data.startswith(b"\x89PNG")
        assert one.caption.startswith("tiny-llava on scenes: ")
