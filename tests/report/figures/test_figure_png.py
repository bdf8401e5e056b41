from __future__ import annotations

from pathlib import Path

import pytest

from kvbench.report.figures import FIGURES
from kvbench.report.figures.draw import draw_pngs, png_names
from kvbench.report.load import load_results
from tests.report.synthetic import body, write_cell


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
