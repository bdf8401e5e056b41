"""A sweep: run what is missing, commit each cell at once, show it, go on."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import Any

from kvbench.results.claims import Claims
from kvbench.results.files import make_folder
from kvbench.results.record import MEASURED
from kvbench.results.store import PartialStore, RecordStore
from kvbench.runs.elsewhere import attempt_ids, statuses_elsewhere
from kvbench.runs.held_claims import HeldClaims
from kvbench.runs.progress import Progress
from kvbench.runs.stop import StopRequest
from kvbench.runs.supervisor import Events, Supervisor, Ticket
from kvbench.runs.workers import WorkerSettings
from kvbench.sinks.base import SinkGroup

_ASK_AGAIN_S = 1.0


class Sweep:
    """The cells of one invocation, by key. Sinks are opened only when there is something to run."""

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
    ) -> None:
        self.results = results
        self.tickets = tickets
        self.num_reused = 0
        self._name, self._workers, self._sinks, self._force = name, workers, sinks, force
        self._store = RecordStore(results)
        self._claims = HeldClaims(claims)
        self._ended: dict[str, str] = {}
        self._measured = False

    def open(self) -> None:
        """Make the results folder and take every accepted record there is. Raises: ConfigError."""
        make_folder(self.results)
        if not self._force:
            self._take_finished()
        self.num_reused = len(self._ended)

    @property
    def name(self) -> str:
        """What the sweep is called."""
        return self._name

    @property
    def missing(self) -> list[str]:
        """Keys of cells that have not ended, in their order."""
        return [key for key in self.tickets if key not in self._ended]

    @property
    def statuses(self) -> dict[str, str]:
        """How each cell that ended did so, by key, in the order of the cells."""
        return {key: self._ended[key] for key in self.tickets if key in self._ended}

    @property
    def num_failed(self) -> int:
        """Cells that were not measured to their end, those that did not end included."""
        return sum(self._ended.get(key) not in MEASURED for key in self.tickets)

    def run(self, stop: StopRequest) -> None:
        """Run every missing cell; those that another process holds are waited for."""
        if not self.missing:
            return
        with contextlib.ExitStack() as stack:
            stack.callback(self._claims.release_all)
            progress = stack.enter_context(
                contextlib.closing(Progress({key: ticket.cell for key, ticket in self.tickets.items()}))
            )
            progress.set_finished(self.num_reused)
            self._sinks.open(self._name, len(self.tickets))
            self._measured = True
            stack.enter_context(contextlib.closing(self._sinks))
            if self._force:
                for key in self.missing:
                    PartialStore(self.results, key).remove()
            while self.missing and stop.number is None:
                self._run_free_cells(progress, stop)

    def _run_free_cells(self, progress: Progress, stop: StopRequest) -> None:
        held = self._claims.take(self.missing, self._workers.most_claims(list(self.tickets.values())))
        if not self._force:
            self._take_finished()
        progress.set_finished(len(self._ended))
        mine = [self.tickets[key] for key in held if key in self.missing]
        if mine:
            plan = self._workers.plan(mine, results=self.results, sweep=self._name)
            Supervisor(plan, self._events(progress, stop)).run(self._workers.groups(mine))
        elif self.missing:
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
        )

    def _end(self, key: str, status: str) -> None:
        self._ended[key] = status
        self._claims.release([key])

    def _take_finished(self) -> None:
        for key in self.missing:
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
            self._take_finished()
        left = {key: self.tickets[key] for key in self.missing}
        self._measured = True
        self._ended |= statuses_elsewhere(left, self._store, self._claims, sweep=self._name, known=known)
