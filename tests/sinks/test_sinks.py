"""A sink that fails costs one line; the console says each cell in one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kvbench.sinks import ConsoleSink, Sink, SinkGroup, cell_line
from kvbench.sinks.wandb.sync import WandbSink
from tests.results.record_bodies import make_body


class _Listing:
    def __init__(self) -> None:
        self.calls: list[Any] = []

    def open(self, sweep: str, num_cells: int) -> None:
        self.calls.append(("open", sweep, num_cells))

    def record(self, body: dict[str, Any]) -> None:
        self.calls.append(body)

    def close(self) -> None:
        self.calls.append("close")


class _Failing(_Listing):
    def record(self, body: dict[str, Any]) -> None:
        super().record(body)
        raise ValueError("two\nlines")


def test_a_failing_sink_does_not_stop_the_others(caplog: pytest.LogCaptureFixture) -> None:
    failing, listing = _Failing(), _Listing()
    group = SinkGroup([failing, listing])
    group.open("demo", 2)
    group.record({"n": 1})
    group.record({"n": 2})
    assert listing.calls == [("open", "demo", 2)], "they wait until nothing is timed"
    group.close()
    assert listing.calls == [("open", "demo", 2), {"n": 1}, {"n": 2}, "close"]
    assert failing.calls == listing.calls
    assert len(caplog.records) == 1
    assert "_Failing failed in record (ValueError: two lines)" in caplog.text


def test_a_summary_is_made_only_for_a_sink_that_shows_it_and_may_fail(caplog: pytest.LogCaptureFixture) -> None:
    class Summary(_Listing):
        def summarise(self, summary: Callable[[], Any]) -> None:
            self.calls.append(summary())

    plain, showing = _Listing(), Summary()
    SinkGroup([plain]).summarise(lambda: pytest.fail("nobody asked"))
    SinkGroup([plain, showing]).summarise(lambda: "all of it")
    assert (plain.calls, showing.calls) == ([], ["all of it"])
    SinkGroup([showing]).summarise(lambda: 1 / 0)
    assert "Summary failed in summarise (ZeroDivisionError: division by zero)" in caplog.text


def test_a_disabled_mirror_makes_no_summary() -> None:
    sink = WandbSink(project="p", mode="disabled")
    sink.open("demo", 2)
    sink.summarise(lambda: pytest.fail("nothing is sent"))


def test_stopping_the_program_is_not_swallowed() -> None:
    class Interrupted(_Listing):
        def record(self, body: dict[str, Any]) -> None:
            raise KeyboardInterrupt

    group = SinkGroup([Interrupted()])
    group.record({})
    with pytest.raises(KeyboardInterrupt):
        group.flush()


def test_an_instant_sink_is_shown_a_cell_at_once_and_the_others_when_nothing_is_timed() -> None:
    class Instant(_Listing):
        is_instant = True

    instant, slow, order = Instant(), _Listing(), []
    group = SinkGroup([slow, instant])
    group.record({"n": 1})
    group.record({"n": 2})
    assert (instant.calls, slow.calls) == ([{"n": 1}, {"n": 2}], [])
    group.flush(lambda: order.append(len(slow.calls)))
    group.flush(lambda: pytest.fail("nothing waits"))
    assert (instant.calls, slow.calls) == ([{"n": 1}, {"n": 2}],) * 2
    assert order == [0, 1], "called before each cell, so that no lease runs out"
    assert ConsoleSink.is_instant
    assert not getattr(WandbSink, "is_instant", False), "it starts processes and waits for a network"


def test_what_a_sink_keeps_running_ends_before_something_is_timed() -> None:
    class Running(_Listing):
        def pause(self) -> None:
            self.calls.append("pause")

    running = Running()
    group = SinkGroup([running])
    group.flush()
    assert running.calls == [], "nothing was started"
    group.record({"n": 1})
    group.record({"n": 2})
    group.flush()
    assert running.calls == [{"n": 1}, {"n": 2}, "pause"]


def test_every_sink_follows_the_protocol() -> None:
    for sink in (ConsoleSink(), WandbSink(project="p"), SinkGroup([])):
        assert isinstance(sink, Sink)


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
