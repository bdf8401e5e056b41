"""Where finished cells are shown: the store is the truth, every sink (console, W&B) is a mirror of it and may fail.

Here lie the contract of a mirror, the group that keeps mirrors from doing harm, and the simplest, the console. Whatever
fails in a sink costs one warning line and nothing else.

    sinks = SinkGroup([ConsoleSink(), WandbSink(project="kvbench", folder=Path("results"))])

`ConsoleSink` prints one line per finished cell, above any progress bar.

[3/13] ok         h2o            20 % tokens kept  PPL 1.234  ROUGE-L vs full 0.912  TPOT 2.26 ms  12.3 s
[4/13] oom        full           -              prefill: OutOfMemoryError: tried to allocate 2 GiB
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Protocol, runtime_checkable

from kvbench.measures import budget_words, format_value, measure
from kvbench.results.record import MEASURED
from kvbench.results.redaction import printable, redact, redacted_body

_log = logging.getLogger(__name__)


@runtime_checkable
class Sink(Protocol):
    """A mirror of the results; called in the order open, record (once per finished cell), close.

    Not while a worker is timing, as a sink may start processes and wait for a network; one that does nothing of
    the kind may say `is_instant = True` and is shown a cell at once.
    """

    def open(self, sweep: str, num_cells: int) -> None:
        """Prepare for `num_cells` records of the sweep named `sweep`."""

    def record(self, body: dict[str, Any]) -> None:
        """Show one finished cell; `body` is the body of a stored record and must not be changed."""

    def close(self) -> None:
        """Finish: everything shown so far is kept, and nothing more follows."""


@runtime_checkable
class Summarising(Protocol):
    """A sink that also shows a sweep as a whole; called after `close`."""

    def summarise(self, summary: Callable[[], Any]) -> None:
        """Show what `summary` makes of the sweep; a sink that sends nothing does not ask for it."""


@runtime_checkable
class Pausing(Protocol):
    """A sink that keeps something running between records; called after the last one before something is timed."""

    def pause(self) -> None:
        """End it; the next record may start it again."""


class SinkGroup:
    """A sink that passes each call to all of `sinks`; a failing one never stops the others.

    Only instant sinks are shown a cell at once, the others at the next `flush`. The first failure of each sink
    logs one warning line; it is still called for the later cells.
    """

    def __init__(self, sinks: Iterable[Sink]) -> None:
        self._sinks = tuple(sinks)
        self._warned: set[int] = set()
        self._waiting: list[dict[str, Any]] = []

    def open(self, sweep: str, num_cells: int) -> None:
        """Open every sink."""
        self._each("open", lambda sink: sink.open(sweep, num_cells))

    def record(self, body: dict[str, Any]) -> None:
        """Pass one finished cell, without secrets, to every instant sink, and keep it for the others."""
        clean = redacted_body(body)
        self._waiting.append(clean)
        self._each("record", lambda sink: sink.record(clean) if _is_instant(sink) else None)

    def flush(self, between: Callable[[], None] = lambda: None) -> None:
        """Pass what was kept to the sinks that take their time, `between` before each; call it while nothing is timed.

        When this returns no sink has anything running.
        """
        if not self._waiting:
            return
        while self._waiting:
            between()
            self._show_slow(self._waiting.pop(0))
        self._each("pause", lambda sink: sink.pause() if isinstance(sink, Pausing) else None)

    def _show_slow(self, body: dict[str, Any]) -> None:
        self._each("record", lambda sink: None if _is_instant(sink) else sink.record(body))

    def summarise(self, summary: Callable[[], Any]) -> None:
        """Offer the whole sweep, once everything is written, to the sinks that have a method `summarise`."""
        self._each("summarise", lambda sink: sink.summarise(summary) if isinstance(sink, Summarising) else None)

    def close(self) -> None:
        """Show what still waits, and close every sink."""
        self.flush()
        self._each("close", lambda sink: sink.close())

    def _each(self, step: str, call: Callable[[Sink], None]) -> None:
        for index, sink in enumerate(self._sinks):
            try:
                call(sink)
            # A mirror may fail in any way (network, disk, a bug in its library); the sweep goes on.
            except Exception as error:
                if index in self._warned:
                    continue
                self._warned.add(index)
                reason = redact(" ".join(str(error).split()))[:200]
                _log.warning(
                    "%s failed in %s (%s: %s); the results are safe in the store, and its further failures are not "
                    "shown.",
                    *(type(sink).__name__, step, type(error).__name__, reason),
                )


def _is_instant(sink: Sink) -> bool:
    return bool(getattr(sink, "is_instant", False))


_HEADLINES = (
    *("ppl", "rougeL_vs_full", "turn1_rougeL_vs_full", "turn2_rougeL_vs_full", "objects_recalled_fraction"),
    *("needles_recalled_fraction", "answers_right_fraction", "tpot_ms", "kv_stored_bytes"),
)


def say(line: str) -> None:
    """Print one line to stdout without breaking a progress bar: no secrets, and "?" for control characters."""
    clean = printable(line)
    try:
        from tqdm import tqdm
    except ImportError:
        sys.stdout.write(clean + "\n")
    else:
        tqdm.write(clean, file=sys.stdout)


class ConsoleSink:
    """Prints status, policy, budget and headline numbers of each cell as it finishes."""

    is_instant: ClassVar[bool] = True

    def __init__(self) -> None:
        self._num_cells = 0
        self._num_finished = 0

    def open(self, sweep: str, num_cells: int) -> None:
        """Start counting the `num_cells` cells of `sweep`."""
        self._num_cells, self._num_finished = num_cells, 0

    def record(self, body: dict[str, Any]) -> None:
        """Print the line of one cell."""
        self._num_finished += 1
        say(f"[{self._num_finished}/{self._num_cells}] {cell_line(body)}")

    def close(self) -> None:
        """Do nothing; every line is out already."""


def cell_line(body: dict[str, Any]) -> str:
    """Return the line for one record body: numbers if it has some, else what went wrong."""
    labels = body["labels"]
    status = body["status"] + ("*" if body.get("tries", 1) > 1 else "")  # it took a second try
    head = f"{status:<10} {labels.get('policy', '?'):<14} {budget_words(labels.get('budget', '-')):<16}"
    if body["status"] in MEASURED:
        # Without intervals, which are in the table at the end: a line has no room for them.
        values = {name: body["measurements"].get(name, {}).get("value") for name in _HEADLINES}
        shown = [f"{measure(name).label} {format_value(name, one)}" for name, one in values.items() if one is not None]
    else:
        error = body["error"] or {}
        first_line = str(error.get("message", "")).strip().partition("\n")[0][:160]
        failure = ": ".join(part for part in (body["phase"], error.get("type"), first_line) if part)
        shown = [failure] if failure else []
    return "  ".join([head if shown else head.rstrip(), *shown, f"{body['duration_s']:.1f} s"])
