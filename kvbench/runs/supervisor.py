"""Run groups of cells in worker processes, so that whatever a cell does costs that cell only.

A worker gets a group (one model, one data set) and loads the model once. When it dies, its own
messages say which cell and phase it was in: that cell gets a record with the reason, and a fresh
worker goes on with the others. A cell that was killed or ran out of memory is tried once more, alone.

This process sleeps until a worker says something or ends, a signal comes, or a deadline passes: it runs on the
cores that workers time on. A worker asks before it times, and is answered when what had to be done here is done.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from kvbench.errors import RecordError
from kvbench.results.record import check_body
from kvbench.runs.cell import Attempt, Cell
from kvbench.runs.verdict import RETRIED, Verdict
from kvbench.runs.watchdog import Limits
from kvbench.runs.worker_pipe import LOAD
from kvbench.runs.worker_process import WorkerProcess

_AFTER_S = 1e-3  # a deadline has passed when it is looked at
_LOOK_AGAIN_S = 1.0  # where a signal cannot wake this process
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Ticket:
    """A cell and the configuration from which a worker builds it again."""

    cell: Cell
    spec: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Events:
    """What the sweep is told: a phase begins, a cell comes further, an attempt ended (for good or not).

    batches: so many of a cell's batches are done, of so many. tick: this process woke up; False to stop. due_s: time
    until it has to wake up for what `tick` does, None for never. quiet: no worker is timing, so what takes time can be
    done now; a worker that wants to time waits.
    """

    active: Callable[[str], None]
    advance: Callable[[str, float], None]
    batches: Callable[[str, int, int], None]
    ended: Callable[[dict[str, Any], bool], None]
    tick: Callable[[], bool]
    due_s: Callable[[], float | None] = lambda: None
    quiet: Callable[[], None] = lambda: None


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

    def __init__(self, plan: WorkerPlan, events: Events, *, selector: selectors.BaseSelector | None = None) -> None:
        self._plan = plan
        self._events = events
        self._tickets: dict[str, Ticket] = {}
        self._queue: deque[list[str]] = deque()
        self._tries: Counter[str] = Counter()
        self._failed_loads: Counter[str] = Counter()
        self._running: dict[int, WorkerProcess] = {}
        self._selector = selector or selectors.DefaultSelector()

    def run(self, groups: Sequence[Sequence[Ticket]]) -> None:
        """Run all groups to their end, or stop early; cells without an `ended` event were not finished."""
        for group in groups:
            self._tickets |= {ticket.cell.key: ticket for ticket in group}
            self._queue.append([ticket.cell.key for ticket in group])
        with _woken_by_signals(self._selector) as always_s:
            try:
                while (self._queue or self._running) and self._events.tick():
                    self._fill_slots()
                    self._sleep(always_s)
                    for slot, worker in list(self._running.items()):
                        self._follow(slot, worker)
                    self._let_time()
            finally:
                self._stop()

    def _sleep(self, always_s: float | None) -> None:
        """Wait for a message, an end, a signal or the next deadline; always_s: no longer than this."""
        self._listen()
        now_s = time.monotonic()
        deadlines = [worker.deadline_s() for worker in self._running.values()]
        waits = [max(0.0, deadline_s - now_s) + _AFTER_S for deadline_s in deadlines if deadline_s is not None]
        waits += [wait_s for wait_s in (self._events.due_s(), always_s) if wait_s is not None]
        for key, _ in self._selector.select(min(waits, default=None)):
            if key.data is not None:
                key.data()

    def _listen(self) -> None:
        """Register what workers can be heard on: a pipe without another end would be readable for ever."""
        wanted = {number for worker in self._running.values() for number in worker.descriptors}
        registered = {number for number, key in self._selector.get_map().items() if key.data is None}
        for number in registered - wanted:
            self._selector.unregister(number)
        for number in wanted - registered:
            self._selector.register(number, selectors.EVENT_READ)

    def _let_time(self) -> None:
        """Do what had to wait if no worker is timing, and answer those that want to."""
        workers = list(self._running.values())
        if not any(worker.is_timing for worker in workers):
            self._events.quiet()
        for worker in workers:
            if worker.waits:
                worker.go()

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

    def _follow(self, slot: int, worker: WorkerProcess) -> None:
        for message in worker.read():
            self._handle(message, worker)
        if worker.ended:
            self._close(slot, worker)
            self._settle(worker)
        else:
            worker.stop_if_stuck()

    def _handle(self, message: Mapping[str, Any], worker: WorkerProcess) -> None:
        if message["event"] == "active":
            self._events.active(message["key"])
        elif message["event"] == "advance":
            self._events.advance(message["key"], message["tasks"])
        elif message["event"] == "batches":
            self._events.batches(message["key"], message["done"], message["total"])
        elif message["event"] == "done":
            self._end(self._sound(message["body"], worker))

    def _sound(self, body: dict[str, Any], worker: WorkerProcess) -> dict[str, Any]:
        """Return `body`, or the failure that it is no record: what one task gives must not end the sweep."""
        try:
            check_body(body)
        except RecordError as error:
            wrong = Verdict(status="crash", kind="RecordError", message=f"the worker told of no record: {error}")
            return self._body(body["key"], "report", wrong, worker)
        return body

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
        if worker.said_goodbye and (worker.num_ended or not worker.keys):
            if worker.keys:
                self._queue.appendleft(worker.keys)
            return
        looked_at = worker.watchdog.active
        if looked_at is not None and worker.active is None:
            key, phase = looked_at
            _log.warning("%s of %s: %s; its record is safe", phase, self._name(key), worker.verdict().message)
            if worker.keys:
                self._queue.appendleft(worker.keys)
            return
        if not worker.keys:
            return
        key, phase = worker.active or (worker.keys[0], LOAD)
        rest = [other for other in worker.keys if other != key]
        verdict = worker.verdict()
        blamed = [key]
        if phase == LOAD and rest:
            # Everybody loads the same model, so a second death there is the group's and not one cell's.
            self._failed_loads[rest[-1]] += 1
            if self._failed_loads[rest[-1]] > 1:
                blamed, rest = worker.keys, []
        for other in blamed:
            self._end(self._body(other, phase, verdict, worker), retry=len(blamed) == 1)
        if rest:
            self._queue.appendleft(rest)

    def _name(self, key: str) -> str:
        return self._tickets[key].cell.name

    def _body(self, key: str, phase: str, verdict: Verdict, worker: WorkerProcess) -> dict[str, Any]:
        attempt = Attempt(cell=self._tickets[key].cell, sweep=self._plan.sweep, phase=phase, status=verdict.status)
        attempt.error = {"type": verdict.kind, "message": verdict.message, "traceback": worker.last_words()}
        attempt.duration_s = worker.watchdog.spent_s.get(key, 0.0)
        attempt.started -= timedelta(seconds=attempt.duration_s)
        return attempt.body(worker.environment)

    def _close(self, slot: int, worker: WorkerProcess) -> None:
        del self._running[slot]
        self._listen()
        worker.close()

    def _stop(self) -> None:
        """End what still runs; the cell that each worker was in is recorded as preempted."""
        for slot, worker in list(self._running.items()):
            for message in worker.read():
                self._handle(message, worker)
            self._close(slot, worker)
            if worker.active is not None:
                stopped = Verdict(status="preempted", kind="Stopped", message="the sweep was stopped from outside")
                key, phase = worker.active
                self._end(self._body(key, phase, stopped, worker))
        self._selector.close()


@contextlib.contextmanager
def _woken_by_signals(selector: selectors.BaseSelector) -> Iterator[float | None]:
    """Let any signal that Python handles end a `select`, which else goes on after it.

    Yields the longest time to sleep: None, or where signals cannot be waited for (not in the main thread) a second.
    """
    if threading.current_thread() is not threading.main_thread():
        yield _LOOK_AGAIN_S
        return
    woken, alarm = os.pipe()
    os.set_blocking(woken, False)
    os.set_blocking(alarm, False)

    def drain() -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(woken, 4096)

    before = signal.set_wakeup_fd(alarm, warn_on_full_buffer=False)
    selector.register(woken, selectors.EVENT_READ, drain)
    try:
        yield None
    finally:
        signal.set_wakeup_fd(before)
        os.close(woken)
        os.close(alarm)
