from __future__ import annotations

import io
from dataclasses import replace

import pytest

from kvbench.sweep import sweep as progress
from kvbench.sweep.cell import Cell
from kvbench.sweep.sweep import Progress
from kvbench.tasks.perplexity import Perplexity
from tests.tasks.benches import cell_of


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


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def test_the_bar_says_batches_rate_and_time_left(terminal: Terminal) -> None:
    clock = Clock()
    bars = Progress(CELLS, now_s=clock)
    for key in "abcd":
        bars.batches(key, 0, 5)
    clock.now_s += 4.0
    for key in "ab":
        bars.show(key)
        bars.advance(key, 2 / 5)
        bars.batches(key, 1, 5)
    assert terminal.getvalue().rpartition("sweep")[2].count("2 of 20 batches, 2.0 s/batch, about 36 s left") == 1
    bars.close()


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out.splitlines()


def test_plain_lines_say_it_from_the_first_batch_on_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    clock = Clock()
    bars = Progress(CELLS, now_s=clock)
    bars.set_finished(0)
    bars.show("a")
    clock.now_s += 60.0  # the model is loaded
    for key in "abcd":
        bars.batches(key, 0, 200)
    assert lines(capsys) == [], "nothing is known yet"
    clock.now_s += 0.5
    bars.advance("a", 2 / 200)
    bars.batches("a", 1, 200)
    assert lines(capsys) == ["0 of 4 cells, 1 of 800 batches, 2.0 batches/s, about 6 min 40 s left: a at -"]
    for number in range(2, 41):
        clock.now_s += 0.5
        bars.advance("a", 2 / 200)
        bars.batches("a", number, 200)
    seldom = lines(capsys)
    assert [line.split(", ")[1] for line in seldom] == ["21 of 800 batches"], "no more than one in ten seconds"
    clock.now_s += 7200.0
    bars.show("b")
    assert lines(capsys) == ["0 of 4 cells, 40 of 800 batches, 180.5 s/batch, about 38 h 06 min left: b at -"]
    clock.now_s += 200.0
    bars.show("c")
    assert lines(capsys) == [], "the longer it takes, the fewer lines"
    bars.close()


def test_what_was_kept_or_done_before_is_no_speed(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    bars = Progress(CELLS, now_s=clock)
    bars.set_finished(2)
    bars.advance("c", 2 * 8 / 10)
    bars.batches("c", 8, 10)
    bars.batches("d", 0, 10)
    bars.batches("nobody", 10**9, 1)
    assert lines(capsys) == []
    clock.now_s += 3.0
    bars.advance("c", 2 / 10)
    bars.batches("c", 9, 10)
    assert lines(capsys) == ["2 of 4 cells, 9 of 20 batches, 3.0 s/batch, about 33 s left"]
    bars.close()


def test_without_batches_no_line_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    bars = Progress(CELLS)
    bars.show("a")
    bars.advance("a", 1.0)
    bars.finish("a")
    bars.close()
    assert lines(capsys) == [], "the console's line per cell is enough"
