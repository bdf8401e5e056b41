from __future__ import annotations

import io
from dataclasses import replace

import pytest

from kvbench.runs import progress
from kvbench.runs.cell import Cell
from kvbench.runs.perplexity import Perplexity
from kvbench.runs.progress import Progress
from tests.runs.benches import cell_of


def named(name: str) -> Cell:
    cell = cell_of(dict.fromkeys("xy", Perplexity()), number=name)
    return replace(cell, labels={**cell.labels, "policy": name})


CELLS = {name: named(name) for name in "abcd"}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    real = progress.tqdm

    def visible(**options: object) -> object:
        return real(**{**options, "file": screen, "ncols": 90, "mininterval": 0})

    monkeypatch.setattr(progress, "tqdm", visible)
    return screen


def test_both_bars_follow_the_cells_of_a_group(terminal: Terminal) -> None:
    bars = Progress(CELLS)
    bars.set_finished(1)
    bars.show("a")
    bars.advance("a", 1.0)
    bars.show("b")
    bars.advance("b", 0.5)
    assert "sweep 1.8/4" in terminal.getvalue(), "1 cell, a half and a quarter"
    bars.show("a")
    assert terminal.getvalue().rstrip().rpartition("a at -")[2].split("%")[0].endswith(" 50 ")
    bars.finish("a")
    bars.finish("b")
    assert "sweep 3.0/4" in terminal.getvalue()
    bars.close()


def test_nothing_is_drawn_where_there_is_no_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    bars = Progress(CELLS)
    bars.show("a")
    bars.advance("a", 1.0)
    bars.finish("a")
    bars.close()
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
