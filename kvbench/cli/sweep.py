"""kvbench as an app of Hydra's: a job is one cell, and what it returns is its objective.

    kvbench policy=h2o                       Hydra calls the app once, in this process
    kvbench -m policy=h2o,full               the sweeper gives all jobs to the supervised launcher, that to `measure`
    kvbench -m hydra/launcher=joblib ...     another launcher calls the app once per job, each in a process of its own
    kvbench -m hydra/sweeper=optuna ...      a search: batch after batch, by either kind of launcher

Whoever launches, a cell goes through the same store, claims, workers and records.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig

from kvbench.config.compose import LEFT_OUT, Composed, copied, job_spec, without_hydra
from kvbench.measures import to_minimise

if TYPE_CHECKING:
    from kvbench.config.build import Shared
    from kvbench.sweep.process import Reserve
    from kvbench.sweep.supervisor import Ticket
    from kvbench.sweep.sweep import Sweep


def quiet_libraries() -> None:
    """Keep notices about optional packages out of the progress bars; what the user has set stays.

    tqdm's monitor is a thread that wakes up to redraw bars, also beside what is timed.
    """
    from tqdm import tqdm

    tqdm.monitor_interval = 0
    logging.getLogger("hydra").setLevel(logging.CRITICAL)  # a class that is not found is told in one line
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


class Stopped(SystemExit):
    """A signal ended the sweep; the same command goes on. `code`: 128 + the signal."""


class Unmeasured(float):
    """The objective of a cell that was not measured: NaN, and its `status` beside it.

    `float()` of it raises ValueError, by which Optuna's sweeper knows a trial that failed; a plain NaN would end it.
    """

    status: str

    def __new__(cls, status: Any = "") -> Unmeasured:
        """Return NaN that carries `status`."""
        made = super().__new__(cls, "nan")
        made.status = str(status)
        return made

    def __float__(self) -> float:
        """Raise ValueError."""
        raise ValueError(f"the cell has no objective: its status is {self.status}")


Objective = float | tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class _Job:
    """A cell, and the measures that are its objective; no names: nobody asks, and what its tasks measure is unknown."""

    composed: Composed
    ticket: Ticket
    objective: tuple[str, ...]


class App:
    """What Hydra calls for a job. In this process all jobs share one sweep; a copy in another process begins its own.

    elsewhere: another launcher made this process for one job. A job that is told to stop ends it without an answer, so
    that a scheduler starts it again. is_search: a sweeper needs the objectives. reserve and meanwhile: the sweep's.
    """

    def __init__(
        self,
        *,
        elsewhere: bool = False,
        is_search: bool = False,
        reserve: Reserve | None = None,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> None:
        self.sweep: Sweep | None = None
        self._elsewhere, self._is_search = elsewhere, is_search
        self._reserve, self._meanwhile = reserve, meanwhile
        self._first: list[Composed] = []
        self._jobs: dict[str, _Job | None] = {}
        self.left_out: dict[str, list[str]] = {}  # the names of cells that cannot run, by the reason

    def __reduce__(self) -> Any:
        return _elsewhere, (self._is_search,)

    def __call__(self, config: Any) -> Objective:
        """Run the cell that Hydra composed, in a supervised worker, and return its objective."""
        quiet_libraries()
        runtime = HydraConfig.get().runtime
        make_importable([source.path for source in runtime.config_sources if source.schema == "file" and source.path])
        (objective,) = self.measure([Composed(config=config, choices=dict(runtime.choices))])
        return objective

    def take(self, grid: Sequence[Composed]) -> list[_Job | None]:
        """Add cells to the sweep, everything checked and finished ones taken; None for one that is left out.

        Raises: ConfigError, DataError.
        """
        from kvbench.config.build import Shared, check_refused, check_shared

        words = [repr(composed.spec) for composed in grid]
        new = [composed for composed, known in zip(grid, words, strict=True) if known not in self._jobs]
        certain = [composed for composed in new if not composed.may_be_left_out]
        check_refused(new)
        check_shared([*self._first, *certain])
        shared, jobs, usable = Shared(), [], []
        for composed, known in zip(grid, words, strict=True):
            if known not in self._jobs:
                self._jobs[known] = self._job(composed, shared)
            jobs.append(self._jobs[known])
            usable += [composed] if jobs[-1] is not None else []
        asked = {id(composed) for composed in new}
        if unsure := [composed for composed in usable if composed.may_be_left_out and id(composed) in asked]:
            check_shared([*self._first, *certain[:1], *unsure])
        self._first = self._first or usable[:1]
        tickets = {job.ticket.cell.key: job.ticket for job in jobs if job is not None}
        if self.sweep is not None:
            self.sweep.add(tickets)
        elif usable:
            self.sweep = _opened(self._first[0].config, tickets, self._reserve, self._meanwhile)
        return jobs

    def _job(self, composed: Composed, shared: Shared) -> _Job | None:
        from kvbench.config.build import build_cell, build_objective
        from kvbench.errors import KvbenchError
        from kvbench.sweep.supervisor import Ticket

        try:
            cell = build_cell(composed, shared)
            objective = build_objective(composed.config, cell, shared, is_needed=self._is_search)
        except KvbenchError as error:
            if not composed.may_be_left_out:
                raise
            self.left_out.setdefault(str(error), []).append(_name(composed))
            return None
        return _Job(composed=composed, ticket=Ticket(cell=cell, spec=composed.spec), objective=objective)

    def measure(self, grid: Sequence[Composed]) -> list[Objective]:
        """Return the objective of each cell; what has no record yet is measured. Raises: Stopped, KvbenchError."""
        from kvbench.sweep.sweep import StopRequest

        jobs = self.take(grid)
        if self.sweep is None:
            return [Unmeasured(LEFT_OUT) for _ in jobs]
        with StopRequest().watching() as stop:
            self.sweep.run(stop, [job.ticket.cell.key for job in jobs if job is not None])
        if stop.number is not None:
            if self._elsewhere:
                os._exit(stop.exit_code)
            raise Stopped(stop.exit_code)
        return [self._objective(self.sweep, job) for job in jobs]

    def composed(self, job: Any) -> Composed:
        """Return the cell of a job's whole configuration, Hydra's own settings included; one it knows is not copied."""
        known = self._jobs.get(repr(job_spec(job)))
        return without_hydra(copied(job)) if known is None else known.composed

    def _objective(self, sweep: Sweep, job: _Job | None) -> Objective:
        if job is None:
            return Unmeasured(LEFT_OUT)
        key = job.ticket.cell.key
        found, status = sweep.measurements(key), sweep.statuses[key]
        values = [None if found is None else found.get(name, {}).get("value") for name in job.objective]
        signed = tuple(
            Unmeasured(status) if value is None else to_minimise(name, value)
            for name, value in zip(job.objective, values, strict=True)
        )
        return signed if len(signed) > 1 else next(iter(signed), Unmeasured(status))


def _name(composed: Composed) -> str:
    """Return "h2o+ada at 0.2 on frankenstein" of a cell that was not made."""
    names = [composed.choices.get(group) for group in ("policy", "policy/allocation", "policy/merge")]
    budget, dataset = composed.config.get("budget") or {}, composed.choices.get("dataset")
    size = budget.get("fraction") or budget.get("tokens")
    return f"{'+'.join(name for name in names if name)} at {size} on {dataset}"


def _elsewhere(is_search: bool) -> App:
    return App(elsewhere=True, is_search=is_search)


def open_sweep(grid: Sequence[Composed]) -> Sweep:
    """Return the sweep over `grid`, everything checked and finished cells taken. Raises: ConfigError, DataError."""
    app = App()
    app.take(grid)
    assert app.sweep is not None
    return app.sweep


def _opened(config: Any, tickets: dict[str, Ticket], reserve: Reserve | None, meanwhile: Callable[[], None]) -> Sweep:
    from kvbench.config.build import build, build_sinks, is_forced, results_folder
    from kvbench.results.claims import Claims
    from kvbench.sweep.supervisor import WorkerSettings
    from kvbench.sweep.sweep import Sweep

    job = os.environ.get("SLURM_JOB_ID")
    owner = f"{socket.gethostname()} process {os.getpid()}" + (f" job {job}" if job else "")
    sweep = Sweep(
        name=str(config.sweep),
        results=results_folder(config),
        tickets=tickets,
        workers=build(config.worker, "worker", is_a=WorkerSettings),
        sinks=build_sinks(config),
        claims=Claims(results_folder(config), owner=owner),
        force=is_forced(config),
        reserve=reserve,
        meanwhile=meanwhile,
    )
    sweep.open()
    return sweep


def make_importable(config_folders: Sequence[str]) -> None:
    """Let `_target_: mine.Mine` be found beside the user's configs or in the working folder.

    They go last on the path, so that no file of theirs can shadow a library.
    """
    for folder in config_folders:
        paths = (str(Path.cwd()), str(Path(folder).parent))
        sys.path += [path for path in paths if path not in sys.path]
