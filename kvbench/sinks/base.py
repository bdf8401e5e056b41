"""The contract of a mirror of the results, and the group that keeps mirrors from doing harm.

A sink shows finished cells somewhere: a terminal, an experiment tracker. It is never the truth (the
record store is), so whatever fails in a sink costs one warning line and nothing else.

    sinks = SinkGroup([ConsoleSink(), WandbSink(project="kvbench", folder=Path("results"))])
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any, Protocol, runtime_checkable

from kvbench.redaction import redact, redacted_body

_log = logging.getLogger(__name__)


@runtime_checkable
class Sink(Protocol):
    """A mirror of the results; called in the order open, record (once per finished cell), close."""

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


class SinkGroup:
    """A sink that passes each call to all of `sinks`; a failing one never stops the others.

    The first failure of each sink logs one warning line; it is still called for the later cells.
    """

    def __init__(self, sinks: Iterable[Sink]) -> None:
        self._sinks = tuple(sinks)
        self._warned: set[int] = set()

    def open(self, sweep: str, num_cells: int) -> None:
        """Open every sink."""
        self._each("open", lambda sink: sink.open(sweep, num_cells))

    def record(self, body: dict[str, Any]) -> None:
        """Pass one finished cell, without secrets, to every sink."""
        clean = redacted_body(body)
        self._each("record", lambda sink: sink.record(clean))

    def summarise(self, summary: Callable[[], Any]) -> None:
        """Offer the whole sweep, once everything is written, to the sinks that have a method `summarise`."""
        self._each("summarise", lambda sink: sink.summarise(summary) if isinstance(sink, Summarising) else None)

    def close(self) -> None:
        """Close every sink."""
        self._each("close", lambda sink: sink.close())

    def _each(self, step: str, call: Callable[[Sink], None]) -> None:
        for index, sink in enumerate(self._sinks):
            try:
                call(sink)
            # A mirror may fail in any way (network, disk, a bug in its library); the sweep goes on.
            except Exception as error:
                self._warn(index, sink, step, error)

    def _warn(self, index: int, sink: Sink, step: str, error: Exception) -> None:
        if index in self._warned:
            return
        self._warned.add(index)
        reason = redact(" ".join(str(error).split()))[:200]
        _log.warning(
            "%s failed in %s (%s: %s); the results are safe in the store, and its further failures are not shown.",
            *(type(sink).__name__, step, type(error).__name__, reason),
        )
