"""What sharing prompts saves: 5 policies x 4 budgets x 16 scenes on the bundled model."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from kvbench.config.build import build_cell
from kvbench.config.compose import compose_grid
from kvbench.sweep.cell import Cell
from kvbench.sweep.group import ModelShelf
from tests.sweep.test_group import told
from tests.sweep.watching import Notes, run_cells

POLICIES = "full,random,streaming_llm,h2o,elastic"
BUDGETS = "0.1,0.2,0.4,0.6"


def sweep(policies: str, budgets: str, num_scenes: int) -> list[Cell]:
    words = [f"policy={policies}", f"budget.fraction={budgets}", "task=quality", f"dataset.num_samples={num_scenes}"]
    cells = map(build_cell, compose_grid(words, multirun=True, config_dir=None))
    return list({cell.key: cell for cell in cells}.values())


def timed(cells: list[Cell], folder: Path, shelf: ModelShelf, *, share: bool) -> tuple[Notes, float]:
    """Run in this process; processor time, so that what else the machine does is not what is measured."""
    start_s = time.process_time()
    notes = run_cells(cells, folder, shelf=shelf, share=share)
    return notes, time.process_time() - start_s


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_a_sweep_takes_at_most_half_of_what_its_cells_take_one_by_one(tmp_path: Path) -> None:
    cells, shelf = sweep(POLICIES, BUDGETS, 16), ModelShelf()
    assert len(cells) == 17, "the full cache has no budget, so its four cells are one"
    run_cells(sweep("full", "0.1", 1), tmp_path / "warm", shelf=shelf)
    together, together_s = timed(cells, tmp_path / "together", shelf, share=True)
    alone, alone_s = timed(cells, tmp_path / "alone", shelf, share=False)
    assert [told(together.bodies[c.key]) for c in cells] == [told(alone.bodies[c.key]) for c in cells]
    assert {body["status"] for body in together.bodies.values()} == {"ok"}
    print(f"together {together_s:.0f} s, one by one {alone_s:.0f} s, ratio {together_s / alone_s:.3f}")
    assert together_s <= 0.5 * alone_s
