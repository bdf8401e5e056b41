"""Workers and a selector on a simulated clock, so that what wakes the supervisor can be counted."""

from __future__ import annotations

import json
import selectors
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvbench.sweep import process as worker_process
from kvbench.sweep import supervisor
from kvbench.sweep import supervisor as held_claims
from kvbench.sweep.process import Begun, Limits, Verdict, Watchdog, WorkerProcess


class Clock:
    """The steady clock; a script is told when it may go on from a timed phase."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Simulated(WorkerProcess):
    """Says what its script holds: pairs of a pause in seconds and a message, or None for its end.

    After a timed phase begins the next pause starts with the parent's answer.
    """

    clock: Clock
    scripts: Mapping[str, Sequence[tuple[float, dict[str, Any] | None]]]
    all: list[Simulated]

    def __init__(
        self,
        job: Mapping[str, Any],
        *,
        keys: Sequence[str],
        limits: Limits,
        log: Path,
        environment: Mapping[str, str],
        begun: Begun | None = None,
    ) -> None:
        self.keys, self._given = list(keys), tuple(keys)
        self.watchdog = Watchdog(limits=limits, now_s=self.clock.now_s)
        self.complaint: str | None = None
        self.said_goodbye = self.ended = self.is_timing = self._is_silenced = False
        self.num_ended, self.environment, self._rest = 0, {}, b""
        self._exit: int | None = -1
        self._script = list(self.scripts[keys[0]])
        self._from_s = self.clock.now_s
        self._gone = False
        self._process: Any = SimpleNamespace(poll=self._poll, wait=lambda *_: 0)
        self.all.append(self)

    def next_s(self) -> float | None:
        """When something becomes readable by itself."""
        if self._gone:
            return None if self.ended else self.clock.now_s
        if self.waits or not self._script:
            return None
        return self._from_s + self._script[0][0]

    def _poll(self) -> int | None:
        next_s = self.next_s()
        if next_s is not None and next_s <= self.clock.now_s and self._script[:1] and self._script[0][1] is None:
            self._gone = True
        return 0 if self._gone else None

    def _available(self) -> bytes:
        lines = []
        while not self._gone and (next_s := self.next_s()) is not None and next_s <= self.clock.now_s:
            if self._script[0][1] is None:
                break
            message = self._script.pop(0)[1]
            self._from_s = next_s
            lines.append(json.dumps({**(message or {}), "at_s": next_s}).encode() + b"\n")
            if message and message.get("timed"):
                break
        return b"".join(lines)

    def go(self) -> None:
        self.is_timing, self._from_s = True, self.clock.now_s
        self.watchdog.resume(self.clock.now_s)

    def kill(self) -> None:
        self._gone = True

    def _signal(self, number: int) -> None:
        """Nobody is there."""

    @property
    def descriptors(self) -> set[int]:
        return set()

    def close(self) -> None:
        """Nothing is open."""

    def verdict(self) -> Verdict:
        return Verdict(status="timeout", kind="Timeout", message=str(self.complaint))

    def last_words(self) -> str:
        return ""


class Selector(selectors.DefaultSelector):  # type: ignore[misc]
    """Sleeps by moving the clock, and counts."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock
        self.num_wakes = 0

    def select(self, timeout: float | None = None) -> list[Any]:
        self.num_wakes += 1
        assert self.num_wakes < 10_000, "it does not sleep"
        times = [next_s for worker in Simulated.all if (next_s := worker.next_s()) is not None]
        times += [] if timeout is None else [self._clock.now_s + timeout]
        assert times, "it would sleep for ever"
        self._clock.now_s = max(self._clock.now_s, min(times))
        return []


def simulate(monkeypatch: pytest.MonkeyPatch, scripts: Mapping[str, Sequence[Any]]) -> tuple[Clock, Selector]:
    """Let supervisors start simulated workers, by the first key of each."""
    clock = Clock()
    for module in (supervisor, worker_process, held_claims):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=clock))
    monkeypatch.setattr(supervisor, "WorkerProcess", Simulated)
    Simulated.clock, Simulated.scripts, Simulated.all = clock, scripts, []
    return clock, Selector(clock)
