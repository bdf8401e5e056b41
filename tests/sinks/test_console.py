from __future__ import annotations

import pytest

from kvbench.sinks import ConsoleSink, cell_line
from tests.results.record_bodies import make_body


def test_a_finished_cell_is_one_line_with_its_headline_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    sink = ConsoleSink()
    sink.open("demo", 13)
    sink.record(make_body())
    sink.close()
    line = capsys.readouterr().out
    assert line.startswith("[1/13] ok ")
    assert line.count("\n") == 1
    for part in ("h2o", "20 % tokens kept", "PPL 1.250", "TPOT 3.50 ms", "KV bytes 1.00 MiB", "1.5 s"):
        assert part in line


def test_a_number_that_is_undefined_is_left_out() -> None:
    body = make_body(measurements={"ppl": {"value": None, "low": None, "high": None}})
    assert "PPL" not in cell_line(body)


def test_a_failed_cell_says_what_failed_and_nothing_can_drive_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    error = {"type": "OutOfMemoryError", "message": "tried \x1b[2J 2 GiB\nsecond line", "traceback": ""}
    sink = ConsoleSink()
    sink.open("demo", 1)
    sink.record(make_body(status="oom", phase="prefill", error=error))
    line = capsys.readouterr().out
    assert "prefill: OutOfMemoryError: tried ?[2J 2 GiB" in line
    assert "\x1b" not in line
    assert "second line" not in line
    assert "PPL" not in line
