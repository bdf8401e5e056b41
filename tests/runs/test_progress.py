from __future__ import annotations

import io

import pytest

from kvbench.runs import progress
from kvbench.runs.progress import Progress


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
    bars = Progress(4)
    bars.set_finished(1)
    bars.show("a", "h2o at 20 %", 2)
    bars.advance("a", 1.0)
    bars.show("b", "random at 20 %", 2)
    bars.advance("b", 0.5)
    assert "sweep 1.8/4" in terminal.getvalue(), "1 cell, a half and a quarter"
    bars.show("a", "h2o at 20 %", 2)
    assert terminal.getvalue().rstrip().rpartition("h2o at 20 %")[2].split("%")[0].endswith(" 50 ")
    bars.finish("a")
    bars.finish("b")
    assert "sweep 3.0/4" in terminal.getvalue()
    bars.close()


def test_nothing_is_drawn_where_there_is_no_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    bars = Progress(1)
    bars.show("a", "h2o", 1)
    bars.advance("a", 1.0)
    bars.finish("a")
    bars.close()
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
