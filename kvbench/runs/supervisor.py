"""Run groups of cells in worker processes, so that whatever a cell does costs that cell only.

A worker gets a group (one model, one data set) and loads the model once. When it dies, its own
messages say which cell and phase it was in: that cell gets a record with the reason, and a fresh
worker goes on with the others. A cell that was killed or ran out of memory is tried once more, alone.
"""

from __future__ import annotations

import selectors
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from kvbench.runs.cell import Attempt, Cell
from kvbench.runs.verdict import RETRIED, Verdict
from kvbench.runs.watchdog import Limits
from kvbench.runs.worker_process import WorkerProcess

_TICK_S = 0.1
_LOAD = "load"


@dataclass(frozen=True, kw_only=True)
class Ticket:
    """A cell and the configuration from which a worker builds it again."""

    cell: Cell
    spec: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Events:
    """What the sweep is told: a phase begins, a cell comes further, an attempt ended (for good or not), a tick."""

    active: Callable[[str], None]
    advance: Callable[[str, float], None]
    ended: Callable[[dict[str, Any], bool], None]
    tick: Callable[[], bool]


@dataclass(frozen=True, kw_only=True)
class WorkerPlan:
    """How workers run. `slots`: environment variables of each worker that may run at the same time.

    `entry` is the module whose `main(job)` a worker runs.
    """

    results: Path
    sweep: str
    share_prompts: bool
    limits: Limits
    num_retries: int
    slots: Sequence[Mapping[str, str]]
    entry: str = "kvbench.worker"

    def job(self, tickets: Sequence[Ticket]) -> dict[str, Any]:
        """Return what a worker is told."""
        return {
            "keys": [ticket.cell.key for ticket in tickets],
            "cells": [dict(ticket.spec) for ticket in tickets],
            "results": str(self.results.absolute()),
            "sweep": self.sweep,
            "share_prompts": self.share_prompts,
            "entry": self.entry,
        }


class Supervisor:
    """Runs groups of tickets; `events.tick` returns False when everything must stop."""

    def __init__(self, plan: WorkerPlan, events: Events) -> None:
        self._plan = plan
        self._events = events
        self._tickets: dict[str, Ticket] = {}
        self._queue: deque[list[str]] = deque()
        self._tries: Counter[str] = Counter()
        self._failed_loads: Counter[str] = Counter()
        self._running: dict[int, WorkerProcess] = {}
        self._selector = selectors.DefaultSelector()

    def run(self, groups: Sequence[Sequence[Ticket]]) -> None:
        """Run all groups to their end, or stop early; cells without an `ended` event were not finished."""
        for group in groups:
            self._tickets |= {ticket.cell.key: ticket for ticket in group}
            self._queue.append([ticket.cell.key for ticket in group])
        try:
            while (self._queue or self._running) and self._events.tick():
                self._fill_slots()
                self._selector.select(_TICK_S)
                for slot, worker in list(self._running.items()):
                    self._follow(slot, worker)
        finally:
            self._stop()

    def _fill_slots(self) -> None:
        for slot in range(len(self._plan.slots)):
            if slot not in self._running and self._queue:
                self._start(slot, self._queue.popleft())

    def _start(self, slot: int, keys: list[str]) -> None:
        worker = WorkerProcess(
            self._plan.job([self._tickets[key] for key in keys]),
            keys=keys,
            limits=self._plan.limits,
            log=self._plan.results / "logs" / f"{keys[0][:16]}.log",
            environment=self._plan.slots[slot],
        )
        self._running[slot] = worker
        self._selector.register(worker.messages, selectors.EVENT_READ)

    def _follow(self, slot: int, worker: WorkerProcess) -> None:
        for message in worker.read():
            self._handle(message)
        if worker.ended:
            self._close(slot, worker)
            self._settle(worker)
        else:
            worker.stop_if_stuck()

    def _handle(self, message: Mapping[str, Any]) -> None:
        if message["event"] == "active":
            self._events.active(message["key"])
        elif message["event"] == "advance":
            self._events.advance(message["key"], message["tasks"])
        elif message["event"] == "done":
            self._end(message["body"])

    def _end(self, body: dict[str, Any], *, retry: bool = True) -> None:
        """Report an attempt, and try the cell once more, alone, where another result is possible."""
        key = body["key"]
        self._tries[key] += 1
        again = retry and body["status"] in RETRIED and self._tries[key] <= self._plan.num_retries
        if again:
            self._queue.append([key])
        if self._tries[key] > 1:
            body["tries"] = self._tries[key]
        self._events.ended(body, not again)

    def _settle(self, worker: WorkerProcess) -> None:
        """Blame the cell that was active when a worker died, and give the others a fresh one."""
        if worker.said_goodbye:
            if worker.keys:
                self._queue.appendleft(worker.keys)
            return
        if not worker.keys:
            return
        key, phase = worker.watchdog.active or (worker.keys[0], _LOAD)
        rest = [other for other in worker.keys if other != key]
        verdict = worker.verdict()
        blamed = [key]
        if phase == _LOAD and rest:
            # Everybody loads the same model, so a second death there is the group's and not one cell's.
            self._failed_loads[rest[-1]] += 1
            if self._failed_loads[rest[-1]] > 1:
                blamed, rest = worker.keys, []
        for other in blamed:
            self._end(self._body(other, phase, verdict, worker), retry=len(blamed) == 1)
        if rest:
            self._queue.appendleft(rest)

    def _body(self, key: str, phase: str, verdict: Verdict, worker: WorkerProcess) -> dict[str, Any]:
        attempt = Attempt(cell=self._tickets[key].cell, sweep=self._plan.sweep, phase=phase, status=verdict.status)
        attempt.error = {"type": verdict.kind, "message": verdict.message, "traceback": worker.last_words()}
        attempt.duration_s = worker.watchdog.spent_s.get(key, 0.0)
        attempt.started -= timedelta(seconds=attempt.duration_s)
        return attempt.body(worker.environment)

    def _close(self, slot: int, worker: WorkerProcess) -> None:
        self._selector.unregister(worker.messages)
        worker.close()
        del self._running[slot]

    def _stop(self) -> None:
        """End what still runs; the cell that each worker was in is recorded as preempted."""
        for slot, worker in list(self._running.items()):
            for message in worker.read():
                self._handle(message)
            self._close(slot, worker)
            if worker.watchdog.active is not None and worker.keys:
                stopped = Verdict(status="preempted", kind="Stopped", message="the sweep was stopped from outside")
                key, phase = worker.watchdog.active
                self._end(self._body(key, phase, stopped, worker))
        self._selector.close()
