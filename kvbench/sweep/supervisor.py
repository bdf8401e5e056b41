"""Run groups of cells in worker processes, so that whatever a cell does costs that cell only.

A worker gets a group (one model, one data set) and loads the model once. When it dies, its own messages say which cell
and phase it was in: that cell gets a record with the reason, and a fresh worker goes on with the others. A cell that
was killed or ran out of memory is tried once more, alone.

This process sleeps until a worker says something or ends, a signal comes, or a deadline passes: it runs on the cores
that workers time on. A worker asks before it times, and is answered when what had to be done here is done and no other
worker of this machine is at work.

`WorkerSettings` are what a user says of it (the settings below `worker`), `HeldClaims` the claims that this process
holds, kept alive while their cells run.
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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from kvbench.errors import ConfigError, RecordError, check_within, close_matches
from kvbench.results.claims import Claim, Claims
from kvbench.results.files import canonical_json
from kvbench.results.record import encode_record
from kvbench.sweep.cell import Attempt, Cell
from kvbench.sweep.process import ENTRY, LOAD, RETRIED, Limits, Reserve, Verdict, WorkerProcess, gpu_slots
from kvbench.tasks.task import is_timed

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
    done now; a worker that wants to time waits. started: the first workers import now, and this process has nothing to
    do for as long.
    """

    active: Callable[[str], None]
    advance: Callable[[str, float], None]
    batches: Callable[[str, int, int], None]
    ended: Callable[[dict[str, Any], bool], None]
    tick: Callable[[], bool]
    due_s: Callable[[], float | None] = lambda: None
    quiet: Callable[[], None] = lambda: None
    started: Callable[[], None] = lambda: None


@dataclass(frozen=True, kw_only=True)
class WorkerPlan:
    """How workers run. `slots`: environment variables of each worker that may run at the same time.

    `entry` is the module whose `main(job, watcher)` a worker runs. begins_early: whether the process of the next group
    may import while a worker computes.
    """

    results: Path
    sweep: str
    share_prompts: bool
    limits: Limits
    num_retries: int
    slots: Sequence[Mapping[str, str]]
    entry: str = ENTRY
    begins_early: bool = False

    def job(self, tickets: Sequence[Ticket]) -> dict[str, Any]:
        """Return what a worker is told."""
        return {
            "keys": [ticket.cell.key for ticket in tickets],
            "cells": [dict(ticket.spec) for ticket in tickets],
            "results": str(self.results.absolute()),
            "sweep": self.sweep,
            "share_prompts": self.share_prompts,
            "num_workers": len(self.slots),
            "entry": self.entry,
        }


class Supervisor:
    """Runs groups of tickets; `events.tick` returns False when everything must stop.

    reserve: processes that have begun already; those that no worker has taken in the end are ended.
    """

    def __init__(
        self,
        plan: WorkerPlan,
        events: Events,
        *,
        selector: selectors.BaseSelector | None = None,
        reserve: Reserve | None = None,
    ) -> None:
        self._plan = plan
        self._events = events
        self._tickets: dict[str, Ticket] = {}
        self._queue: deque[list[str]] = deque()
        self._tries: Counter[str] = Counter()
        self._failed_loads: Counter[str] = Counter()
        self._running: dict[int, WorkerProcess] = {}
        self._selector = selector or selectors.DefaultSelector()
        self._reserve = Reserve() if reserve is None else reserve
        self._has_started = False

    def run(self, groups: Sequence[Sequence[Ticket]]) -> None:
        """Run all groups to their end, or stop early; cells without an `ended` event were not finished."""
        for group in groups:
            self._tickets |= {ticket.cell.key: ticket for ticket in group}
            self._queue.append([ticket.cell.key for ticket in group])
        with _woken_by_signals(self._selector) as always_s:
            try:
                while (self._queue or self._running) and self._events.tick():
                    self._fill_slots()
                    self._begin_early()
                    self._tell_started()
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
        """Do what had to wait if no worker is timing; then answer one that wants to, if every worker does.

        Workers of one machine share its processors, memory bus and power, whatever GPU each has: of those that want to
        time the one that has waited longest goes first, alone, and the others wait with nothing to do.
        """
        workers = list(self._running.values())
        if any(worker.is_timing for worker in workers):
            return
        self._events.quiet()
        if workers and all(worker.waits for worker in workers):
            min(workers, key=lambda worker: worker.watchdog.waits_from_s).go()

    def _fill_slots(self) -> None:
        if any(worker.waits or worker.is_timing for worker in self._running.values()):
            return  # what starts now would work beside it
        for slot in range(len(self._plan.slots)):
            if slot not in self._running and self._queue:
                self._start(slot, self._queue.popleft())

    def _begin_early(self) -> None:
        """Let processes begin for the groups that wait, beside workers that compute; end those that nobody needs.

        What imports works on the cores and the memory bus. So where anything is timed, in this sweep, no process is
        there but the workers.
        """
        may_begin = self._plan.begins_early and self._queue
        self._reserve.keep(self._plan.slots if may_begin else ())
        if not may_begin:
            return
        for slot, worker in self._running.items():
            environment = self._plan.slots[slot]
            if worker.computes and not self._reserve.num_for(environment) and len(self._reserve) < len(self._queue):
                self._reserve.begin(environment, entry=self._plan.entry)

    def _tell_started(self) -> None:
        if not self._has_started:
            self._has_started = True
            self._events.started()

    def _start(self, slot: int, keys: list[str]) -> None:
        self._running[slot] = WorkerProcess(
            self._plan.job([self._tickets[key] for key in keys]),
            keys=keys,
            limits=self._plan.limits,
            log=self._plan.results / "logs" / f"{keys[0][:16]}.log",
            environment=self._plan.slots[slot],
            begun=self._reserve.take(self._plan.slots[slot], entry=self._plan.entry),
        )

    def _follow(self, slot: int, worker: WorkerProcess) -> None:
        for message in worker.read():
            self._handle(message, worker)
        if worker.ended:
            self._close(slot, worker)
            self._settle(worker)
        else:
            worker.stop_if_stuck()

    def _handle(self, message: Mapping[str, Any], worker: WorkerProcess) -> None:
        match message:
            case {"event": "active", "key": key}:
                self._events.active(key)
            case {"event": "advance", "key": key, "tasks": tasks}:
                self._events.advance(key, tasks)
            case {"event": "batches", "key": key, "done": done, "total": total}:
                self._events.batches(key, done, total)
            case {"event": "done", "body": body}:
                self._end(self._sound(body, worker))

    def _sound(self, body: dict[str, Any], worker: WorkerProcess) -> dict[str, Any]:
        """Return `body`, or the failure that it is no record: what one task gives must not end the sweep."""
        try:
            encode_record(body)
        except (RecordError, RecursionError) as error:  # the latter of what is nested too deep
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
            name, phase = self._tickets[looked_at[0]].cell.name, looked_at[1]
            _log.warning("%s of %s: %s; its record is safe", phase, name, worker.verdict().message)
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
        self._reserve.close()
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


_ISOLATIONS = ("group", "cell")


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """One worker per group of cells (`isolation=group`) or per cell (`isolation=cell`).

    timeout_s: time one cell may take in all, None for no limit. silence_s: time without any step, None
    for no limit. num_retries: fresh tries of a cell that was killed or ran out of memory. share_prompts:
    one prefill for all cells of a group; the quality numbers are the same without. group_cells: cells
    that one worker takes at most, so that several machines on one results folder share a sweep evenly.
    """

    isolation: str = "group"
    timeout_s: float | None = None
    silence_s: float | None = 900.0
    num_retries: int = 1
    share_prompts: bool = True
    group_cells: int | None = None

    def __post_init__(self) -> None:
        if self.isolation not in _ISOLATIONS:
            raise ConfigError(f"worker.isolation is {self.isolation!r}; {close_matches(self.isolation, _ISOLATIONS)}")
        for name in ("timeout_s", "silence_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"worker.{name} is {value}; it must be above 0 seconds, or null for no limit")
        check_within("worker", self, num_retries=(0, None), group_cells=(1, None))

    def plan(self, tickets: Sequence[Ticket], *, results: Path, sweep: str) -> WorkerPlan:
        """Return what the supervisor needs to know to run `tickets`."""
        return WorkerPlan(
            results=results,
            sweep=sweep,
            share_prompts=self.share_prompts,
            limits=Limits(timeout_s=self.timeout_s, silence_s=self.silence_s),
            num_retries=self.num_retries,
            slots=slots_of(tickets),
            begins_early=not any(_is_disturbed(ticket.cell) for ticket in tickets),
        )

    def groups(self, tickets: Sequence[Ticket]) -> list[list[Ticket]]:
        """Return the tickets by what their cells share, no group larger than it may be, in their order."""
        found: dict[str, list[Ticket]] = {}
        for ticket in tickets:
            found.setdefault(canonical_json(ticket.cell.shared_settings), []).append(ticket)
        slots = max(1, len(slots_of(tickets)) // max(1, len(found)))
        most = 1 if self.isolation == "cell" else self.group_cells or len(tickets)
        groups = []
        for group in found.values():
            size = min(most, -(-len(group) // slots))  # every GPU gets some
            groups += [group[start : start + size] for start in range(0, len(group), size)]
        return groups

    def most_claims(self, tickets: Sequence[Ticket]) -> int | None:
        """Return how many cells to claim at once; None for all there are."""
        return None if self.group_cells is None else self.group_cells * len(slots_of(tickets))


def _is_disturbed(cell: Cell) -> bool:
    """Whether a process that imports would be in the way: of what is timed, and of a CPU, all of which computes."""
    return not cell.device.startswith("cuda") or any(map(is_timed, cell.tasks.values()))


def slots_of(tickets: Sequence[Ticket], environment: Mapping[str, str] = os.environ) -> list[dict[str, str]]:
    """Return the environment of each worker that may run at the same time: one per GPU with device=auto.

    One that sees all GPUs where a model is spread over several.
    """
    asked: Any = {str(ticket.spec["config"].get("device")) for ticket in tickets}
    if asked != {"auto"} or not all(ticket.cell.device.startswith("cuda") for ticket in tickets):
        return [{}]
    if any(ticket.cell.spread_over for ticket in tickets):
        return [{}]
    return gpu_slots(_num_gpus(), environment.get("CUDA_VISIBLE_DEVICES"))


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count()


_BEATS_PER_LEASE = 5


class HeldClaims:
    """Takes, beats and releases the claims of a sweep."""

    def __init__(self, claims: Claims) -> None:
        self._claims = claims
        self._held: dict[str, Claim] = {}
        self._beaten_s = time.monotonic()

    def take(self, keys: Iterable[str], most: int | None) -> list[str]:
        """Take what nobody else works on, `most` at once; return every key that is held now."""
        for key in keys:
            if most is not None and len(self._held) >= most:
                break
            claim = self._claims.take(key) if key not in self._held else None
            if claim is not None:
                self._held[key] = claim
        return list(self._held)

    def due_s(self) -> float | None:
        """Return the seconds until `beat` has something to do; None if nothing is held."""
        if not self._held:
            return None
        return max(0.0, self._beaten_s + self._claims.lease_s / _BEATS_PER_LEASE - time.monotonic())

    def beat(self) -> None:
        """Show others that this process lives; cheap enough to be called all the time."""
        if self.due_s() == 0.0:
            self._beaten_s = time.monotonic()
            for claim in self._held.values():
                claim.beat()

    def release(self, keys: Iterable[str]) -> None:
        """Let cells go that have ended, or that are left to others."""
        for key in list(keys):
            claim = self._held.pop(key, None)
            if claim is not None:
                claim.release()

    def release_all(self) -> None:
        """Let everything go."""
        self.release(list(self._held))
