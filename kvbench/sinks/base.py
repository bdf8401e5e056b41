"""The contract of a mirror of the results, and the group that keeps mirrors from doing harm.

A sink shows finished cells somewhere: a terminal, an experiment tracker. It is never the truth (the
record store is), so whatever fails in a sink costs one warning line and nothing else.

    sinks = SinkGroup([ConsoleSink(), WandbSink(project="kvbench", folder=Path("results"))])
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any, Protocol, runtime_checkable

from kvbench.results.redaction import redact, redacted_body

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
