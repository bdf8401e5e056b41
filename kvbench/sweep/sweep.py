"""A sweep: run what is missing, commit each cell at once, show it, go on.

`StopRequest` is being told to stop: the first signal asks, a second one does not wait. `Progress` says how far a sweep
is: two bars on a terminal, the sweep's cells and the cell that is running now; elsewhere plain lines, from the first
batch on and then seldom enough to leave a log readable:

    0 of 16 cells, 5 of 320 batches, 1.2 batches/s, about 4 min left: h2o at 20 % tokens kept

What became of cells whose jobs ran elsewhere is told from the records they left, by names, never by times: the clocks
of other machines may be wrong by minutes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm import tqdm

from kvbench.errors import RecordError
from kvbench.results.claims import Claims
from kvbench.results.files import make_folder
from kvbench.results.record import MEASURED, read_record
from kvbench.results.store import PartialStore, RecordStore
from kvbench.sinks import SinkGroup, say
from kvbench.sweep.cell import Attempt, Cell
from kvbench.sweep.process import Reserve
from kvbench.sweep.supervisor import Events, HeldClaims, Supervisor, Ticket, WorkerSettings

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)  # the last is what SLURM is asked to send before its limit


class StopRequest:
    """Whether someone asked this process to stop."""

    def __init__(self) -> None:
        self.number: int | None = None

    @property
    def exit_code(self) -> int:
        """128 + the signal, as shells say it."""
        return 128 + (self.number or 0)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            os._exit(128 + number)  # workers die with this process
        self.number = number

    @contextlib.contextmanager
    def watching(self) -> Iterator[StopRequest]:
        """Take the signals while the block runs, then give them back to whoever had them."""
        before = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


_SWEEP_FORMAT = "{desc} {n:.1f}/{total} |{bar}| {elapsed}{postfix}"
_CELL_FORMAT = "{desc:<40.40} |{bar}| {percentage:3.0f} %"
_LINE_EVERY_S = 10.0
_LINE_EVERY_FRACTION = 0.05  # of the time so far, so that a long sweep writes some dozen lines more, not thousands


class Progress:
    """Bars on a terminal, lines elsewhere; nothing runs by itself, so nothing is drawn while a worker is silent.

    Cells of a group come forward together, so a cell's share is kept when another one is shown. What was done before
    counts as done and not as speed. now_s: the steady clock.
    """

    def __init__(self, cells: Mapping[str, Cell], *, now_s: Callable[[], float] = time.monotonic) -> None:
        self._all = cells
        self._now_s = now_s
        self._sweep = _bar(0, len(cells), "sweep", _SWEEP_FORMAT)
        self._cell = _bar(1, 1, "", _CELL_FORMAT)
        self._tasks: dict[str, float] = {}
        self._batches: dict[str, tuple[int, int]] = {}
        self._shown: str | None = None
        self._num_finished = 0
        self._start_s: float | None = None
        self._kept_cells, self._kept_batches = 0.0, 0
        self._next_line_s = 0.0

    def set_finished(self, num_cells: int) -> None:
        """Count cells that were done before."""
        self._kept_cells += num_cells - self._num_finished
        self._num_finished = num_cells
        self._draw()

    def show(self, key: str) -> None:
        """Show the cell `key`, which runs now."""
        self._tasks.setdefault(key, 0.0)
        if key != self._shown:
            self._shown = key
            self._draw()

    def advance(self, key: str, tasks: float) -> None:
        """Move a cell by a share of a task."""
        if key in self._all:
            self._tasks[key] = self._tasks.get(key, 0.0) + tasks
            self._draw(write_line=False)  # where it was a batch, its number follows

    def batches(self, key: str, done: int, total: int) -> None:
        """Take how many of a cell's batches are done; the first word about each is what was there before."""
        if key not in self._all:
            return
        if key not in self._batches:
            self._kept_cells += self._share(key) if key in self._tasks else 0.0
            self._kept_batches += done
        if self._start_s is None:  # the model is loaded now
            self._start_s = self._now_s()
        self._batches[key] = (done, total)
        self._draw()

    def finish(self, key: str) -> None:
        """Count the cell as done."""
        self._tasks.pop(key, None)
        self._num_finished += 1
        self._draw()

    def close(self) -> None:
        """Close both bars."""
        self._cell.close()
        self._sweep.close()

    @property
    def _share_done(self) -> float:
        """Cells that are done, and the shares of those that run."""
        return min(self._num_finished + sum(map(self._share, self._tasks)), float(len(self._all)))

    @property
    def _num_batches(self) -> tuple[int, int]:
        """Batches done and planned, of the cells that have begun."""
        return sum(done for done, _ in self._batches.values()), sum(total for _, total in self._batches.values())

    def _draw(self, *, write_line: bool = True) -> None:
        self._sweep.n = self._share_done
        shown = self._shown if self._shown in self._tasks else None
        self._cell.n = self._share(shown) if shown else 0.0
        if self._sweep.disable:
            if write_line:
                self._write_line(shown)
            return
        self._sweep.set_postfix_str(", ".join(self._words()), refresh=False)
        self._cell.set_description_str(f"  {self._all[shown].name}" if shown else "", refresh=False)
        self._sweep.refresh()
        self._cell.refresh()

    def _write_line(self, shown: str | None) -> None:
        now_s = self._now_s()
        if self._start_s is None or self._num_batches[0] <= self._kept_batches or now_s < self._next_line_s:
            return
        self._next_line_s = now_s + max(_LINE_EVERY_S, _LINE_EVERY_FRACTION * (now_s - self._start_s))
        cells = f"{self._num_finished} of {len(self._all)} cells"
        say(", ".join([cells, *self._words()]) + (f": {self._all[shown].name}" if shown else ""))

    def _words(self) -> list[str]:
        """Return batches, rate and time left, as far as they are known."""
        done, total = self._num_batches
        words = [f"{done} of {total} batches"] if total else []
        elapsed_s = 0.0 if self._start_s is None else self._now_s() - self._start_s
        if elapsed_s <= 0:
            return words
        if done > self._kept_batches:
            words.append(_rate((done - self._kept_batches) / elapsed_s))
        if (cells := self._share_done - self._kept_cells) > 0:
            words.append(f"about {_duration(elapsed_s * (len(self._all) - self._share_done) / cells)} left")
        return words

    def _share(self, key: str) -> float:
        return min(1.0, self._tasks[key] / len(self._all[key].tasks))


def _rate(per_s: float) -> str:
    return f"{per_s:.1f} batches/s" if per_s >= 1 else f"{1 / per_s:.1f} s/batch"


def _duration(time_s: float) -> str:
    minutes, seconds = divmod(round(time_s), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"


def _bar(position: int, total: int, name: str, form: str) -> tqdm[Any]:
    return tqdm(total=total, desc=name, position=position, disable=None, bar_format=form, leave=False)


def attempt_ids(keys: Sequence[str], store: RecordStore) -> frozenset[str]:
    """Return the ids of all attempts at the cells `keys` that there are."""
    return frozenset(str(body["attempt"]) for key in keys for body in store.attempts(key))


def statuses_elsewhere(
    tickets: Mapping[str, Ticket], store: RecordStore, claims: HeldClaims, *, sweep: str, known: Set[str]
) -> dict[str, str]:
    """Return the status of each cell with an attempt that is not `known`, or that nobody works on any more.

    The latter was lost with its job and gets a record that says so. A cell that a living job holds is left out.
    """
    found = {}
    for key, ticket in tickets.items():
        status = _status(key, store, known)
        if status is None and key in claims.take([key], None):
            status = _status(key, store, known)  # it may have ended just before its claim went
            if status is None:
                lost = Attempt(cell=ticket.cell, sweep=sweep, phase=None, status="killed")
                lost.error = {"type": "JobLost", "message": "its job ended without a record", "traceback": ""}
                store.commit(lost.body({}))
                status = lost.status
            claims.release([key])
        if status is not None:
            found[key] = status
    return found


def _status(key: str, store: RecordStore, known: Set[str]) -> str | None:
    """Return how the new attempts at a cell came out; None if there are none.

    One that measured it counts first. Of failed ones it is the one that was stored last, as the store saw it.
    """
    new = [body for body in store.attempts(key) if body["attempt"] not in known]
    if not new:
        return None
    last: list[dict[str, Any]] = []
    with contextlib.suppress(RecordError):
        last = [body for body in (read_record(store.record_file(key)),) if body["attempt"] not in known]
    chosen = next((body for body in new if body["status"] in MEASURED), (last or new)[-1])
    return str(chosen["status"])


_ASK_AGAIN_S = 1.0


class Sweep:
    """The cells of one invocation, by key; a search adds them batch by batch.

    Sinks are opened only when there is something to run. reserve: processes that have begun, for its workers.
    meanwhile: done once, while the first workers import.
    """

    def __init__(
        self,
        *,
        name: str,
        results: Path,
        tickets: Mapping[str, Ticket],
        workers: WorkerSettings,
        sinks: SinkGroup,
        claims: Claims,
        force: bool,
        reserve: Reserve | None = None,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = name
        self.results = results
        self.tickets: dict[str, Ticket] = dict(tickets)
        self.num_reused = 0
        self._workers, self._sinks, self._force = workers, sinks, force
        self._store = RecordStore(results)
        self._claims = HeldClaims(claims)
        self._reserve, self._meanwhile = Reserve() if reserve is None else reserve, meanwhile
        self._ended: dict[str, str] = {}
        self._measured = False

    def open(self) -> None:
        """Make the results folder and take every accepted record there is. Raises: ConfigError."""
        make_folder(self.results)
        if not self._force:
            self._take_finished(self.missing)
        self.num_reused = len(self._ended)

    def add(self, tickets: Mapping[str, Ticket]) -> None:
        """Take in the cells of a further batch, and every accepted record of theirs that there is."""
        before = len(self._ended)
        new = [key for key in tickets if key not in self.tickets]
        self.tickets |= tickets
        if not self._force:
            self._take_finished(new)
        self.num_reused += len(self._ended) - before

    @property
    def missing(self) -> list[str]:
        """Keys of cells that have not ended, in their order."""
        return self._missing(self.tickets)

    def _missing(self, keys: Iterable[str]) -> list[str]:
        return [key for key in keys if key not in self._ended]

    @property
    def statuses(self) -> dict[str, str]:
        """How each cell that ended did so, by key, in the order of the cells."""
        return {key: self._ended[key] for key in self.tickets if key in self._ended}

    @property
    def num_failed(self) -> int:
        """Cells that were not measured to their end, those that did not end included."""
        return sum(self._ended.get(key) not in MEASURED for key in self.tickets)

    def measurements(self, key: str) -> dict[str, Any] | None:
        """Return what was measured of a cell, by name; None if it failed now, whatever an older record holds."""
        body = self._store.accepted(key) if self._ended.get(key) in MEASURED else None
        return None if body is None else dict(body["measurements"])

    def run(self, stop: StopRequest, keys: Iterable[str] | None = None) -> None:
        """Run every missing cell, of `keys` where given; those that another process holds are waited for."""
        batch = dict.fromkeys(self.tickets if keys is None else keys)
        if not self._missing(batch):
            return
        cells = {key: self.tickets[key].cell for key in batch}
        with contextlib.ExitStack() as stack:
            stack.callback(self._claims.release_all)
            progress = stack.enter_context(contextlib.closing(Progress(cells)))
            progress.set_finished(len(batch) - len(self._missing(batch)))
            self._sinks.open(self.name, len(batch))
            self._measured = True
            stack.enter_context(contextlib.closing(self._sinks))
            if self._force:
                for key in self._missing(batch):
                    PartialStore(self.results, key).remove()
            while self._missing(batch) and stop.number is None:
                self._run_free_cells(batch, progress, stop)

    def _run_free_cells(self, batch: Mapping[str, None], progress: Progress, stop: StopRequest) -> None:
        missing = self._missing(batch)
        held = self._claims.take(missing, self._workers.most_claims([self.tickets[key] for key in batch]))
        if not self._force:
            self._take_finished(missing)
        missing = self._missing(batch)
        progress.set_finished(len(batch) - len(missing))
        mine = [self.tickets[key] for key in held if key in missing]
        if mine:
            plan = self._workers.plan(mine, results=self.results, sweep=self.name)
            events = self._events(progress, stop)
            Supervisor(plan, events, reserve=self._reserve).run(self._workers.groups(mine))
        elif missing:
            time.sleep(_ASK_AGAIN_S)

    def _events(self, progress: Progress, stop: StopRequest) -> Events:
        def ended(body: dict[str, Any], final: bool) -> None:
            self._store.commit(body, replace=self._force)
            if final:
                self._end(body["key"], body["status"])
                progress.finish(body["key"])
                self._sinks.record(body)

        def tick() -> bool:
            self._claims.beat()
            return stop.number is None

        return Events(
            active=progress.show,
            advance=progress.advance,
            batches=progress.batches,
            ended=ended,
            tick=tick,
            due_s=self._claims.due_s,
            quiet=lambda: self._sinks.flush(self._claims.beat),
            started=self._started,
        )

    def _started(self) -> None:
        todo, self._meanwhile = self._meanwhile, lambda: None
        todo()

    def _end(self, key: str, status: str) -> None:
        self._ended[key] = status
        self._claims.release([key])

    def _take_finished(self, keys: Iterable[str]) -> None:
        for key in self._missing(keys):
            if (body := self._store.accepted(key)) is not None:
                self._end(key, str(body["status"]))

    def summarise(self, summary: Callable[[], Any]) -> None:
        """Offer what was measured now, as a whole, to the sinks; a single cell has its own run only."""
        if self._measured and len(self.tickets) > 1:
            self._sinks.summarise(summary)

    @property
    def attempt_ids(self) -> frozenset[str]:
        """All attempts at the missing cells that are there now, by their ids."""
        return attempt_ids(self.missing, self._store)

    def gather(self, known: Set[str]) -> None:
        """Take what jobs elsewhere have left; `known`: the attempts of before, which are not theirs."""
        if not self._force:
            self._take_finished(self.missing)
        left = {key: self.tickets[key] for key in self.missing}
        self._measured = True
        self._ended |= statuses_elsewhere(left, self._store, self._claims, sweep=self.name, known=known)
