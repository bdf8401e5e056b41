"""Runs sent to W&B: as cells finish, by the sink of a sweep, and at any later time, from the records of a folder.

    sinks = SinkGroup([WandbSink(project="kvbench", folder=Path("results"))])
    outcome = send_runs(jobs_of(Path("results"), "demo", Path("results")), place, "online", reached)

Nothing here can stop or hang a sweep: starting and finishing an online run have a time limit, and after the first
failure the rest of the sweep is kept offline, with one line that says how to upload it.

Which cells a sweep had when its summary was sent, those it measured and those it found measured before, is kept in
`<folder>/wandb/sweeps/<id of the summary run>.json`: a record names the sweep that measured it, and no later one
that used it. Losing these files costs the latter.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from kvbench import installed_version
from kvbench.errors import ConfigError, check_known
from kvbench.results.record import MEASURED, read_cell
from kvbench.results.redaction import redacted_body
from kvbench.results.store import RecordStore
from kvbench.sinks import say
from kvbench.sinks.wandb.content import cell_digest, cell_run, summary_digest, summary_id, summary_of
from kvbench.sinks.wandb.run import (
    MODES,
    Mode,
    Online,
    Place,
    RunSpec,
    check_online,
    check_project,
    keep_note,
    kept_note,
    reason_of,
    resolve_mode,
    restart_service,
    write_run,
)

_KIND = "kvbench_wandb_sweep"
_LONGEST_TIMEOUT_S = 30.0
_log = logging.getLogger(__name__)
_HOPELESS = 2  # runs that fail slowly one after the other: the server is gone; a run that it refuses fails at once


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run that may be there already; `make` is only called if it is not."""

    id: str
    digest: str
    what: str
    make: Callable[[], RunSpec]


@dataclass(kw_only=True)
class Outcome:
    """What became of the jobs: how many of each kind were sent and were there already, and why some failed."""

    sent: dict[str, int] = field(default_factory=dict)
    num_there: int = 0
    num_left: int = 0
    failures: list[str] = field(default_factory=list)


def send_runs(jobs: Sequence[Job], place: Place, mode: Online, reached: Callable[[], object]) -> Outcome:
    """Send each of `jobs` that is not there, calling `reached` after each; stop when the server seems to be gone.

    Each run takes `place.timeout_s` to start and again to end, at most. Nothing is raised for a run that fails.
    """
    outcome, in_a_row = Outcome(), 0
    for number, job in enumerate(jobs):
        if place.has(job.id, job.digest, mode):
            outcome.num_there += 1
        else:
            start_s = time.monotonic()
            try:
                write_run(job.make(), place, mode)
            # wandb raises many kinds: no network, refused key, deleted run, time limit.
            except Exception as error:
                outcome.failures.append(f"{job.id}: {reason_of(error)}")
                restart_service(place.timeout_s)
                in_a_row += time.monotonic() - start_s > 0.5 * place.timeout_s
            else:
                outcome.sent[job.what] = outcome.sent.get(job.what, 0) + 1
                in_a_row = 0
        reached()
        if in_a_row == _HOPELESS:
            outcome.num_left = len(jobs) - number - 1
            break
    if outcome.sent or outcome.failures:
        restart_service(place.timeout_s)
    return outcome


def jobs_of(folder: Path, sweep: str | None, to: Path) -> list[Job]:
    """Return a job per cell, and one per sweep of more than one cell, each sweep's own after its cells.

    to: the folder of wandb's files. Raises: ConfigError if there is nothing to send.
    """
    from kvbench.report.load import load_results

    loaded, store = load_results(folder, sweep=sweep), RecordStore(folder)
    for problem in loaded.problems:
        say(f"problem: {problem.path}: {problem.message}")
    sweeps: dict[str, list[str]] = {}
    for cell in loaded.records:
        if store.record_file(cell.key).exists():  # one that was moved is among the problems
            sweeps.setdefault(cell.sweep, []).append(cell.key)
    if not sweeps:
        raise ConfigError("no record is left to send; kvbench results list shows what there is")
    return [job for name, keys in sorted(sweeps.items()) for job in _sweep_jobs(store, name, keys, to)]


def _sweep_jobs(store: RecordStore, sweep: str, keys: list[str], to: Path) -> Iterator[Job]:
    def body(key: str) -> dict[str, Any]:
        # Read again when its turn comes: the bodies of a large sweep need not be held together.
        return redacted_body(read_cell(store.cell_folder(key)).body)

    def run(key: str) -> RunSpec:
        return cell_run(body(key))

    known = {key: cell_digest(body(key)) for key in keys}
    yield from (Job(id=key[:16], digest=known[key], what="cell", make=partial(run, key)) for key in keys)
    keys = cells_of_sweep(store.folder, sweep, keys, lambda key: store.record_file(key).exists())
    if len(keys) > 1:
        digest = summary_digest([known.get(key) or cell_digest(body(key)) for key in keys], installed_version())
        make = partial(summary_of, store.folder, sweep, keys, to=to)
        yield Job(id=summary_id(sweep, keys), digest=digest, what="summary", make=make)


def note_sweep(folder: Path, run_id: str, sweep: str, keys: Collection[str]) -> None:
    """Keep which cells the summary `run_id` of `sweep` shows; a disk that refuses costs the note."""
    keep_note(folder / "wandb" / "sweeps" / f"{run_id}.json", _KIND, {"sweep": sweep, "keys": sorted(keys)})


def cells_of_sweep(folder: Path, sweep: str, measured: Collection[str], is_there: Callable[[str], bool]) -> list[str]:
    """Return the keys of the largest noted sweep of that name that has all of `measured` and whose cells are all there.

    Without such a note, `measured` themselves.
    """
    best = sorted(measured)
    for path in sorted((folder / "wandb" / "sweeps").glob("*.json")):
        body = kept_note(path, _KIND)
        if body.get("sweep") == sweep and set(measured) <= set(body["keys"]) and all(map(is_there, body["keys"])):
            best = max(best, body["keys"], key=len)
    return best


@dataclass(kw_only=True)
class _Sweep:
    """What changes while a sweep runs; the sink itself stays frozen."""

    name: str = ""
    mode: Mode | None = None  # not decided before the first sweep
    reason: str = ""
    num_offline: int = 0
    started: bool = False


@dataclass(frozen=True, kw_only=True)
class WandbSink:
    """Sends each finished cell to one run of `project`, and the whole sweep to one more.

    mode: "auto" is "online" if an API key is found, else "offline"; "disabled" does nothing.
    folder: the results folder; the runs' files go to its subfolder wandb/.
    timeout_s: limit for the start, and again for the end, of an online run.
    """

    project: str
    mode: str = "auto"
    folder: Path = Path("results")
    entity: str | None = None
    timeout_s: float = 10.0
    _sweep: _Sweep = field(default_factory=_Sweep, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_known("sink.wandb.mode", self.mode, MODES)
        if not 0 < self.timeout_s <= _LONGEST_TIMEOUT_S:
            raise ConfigError(f"sink.wandb.timeout_s is {self.timeout_s:g}; it must lie in (0, {_LONGEST_TIMEOUT_S:g}]")
        check_project(self.project, "sink.wandb.project")
        if self.mode == "online":
            check_online()
        object.__setattr__(self, "folder", Path(self.folder))  # yaml gives text

    def open(self, sweep: str, num_cells: int) -> None:
        """Decide the mode for `sweep`; a missing wandb package is one warning line."""
        object.__setattr__(self, "_sweep", _Sweep(name=sweep, mode="disabled"))
        if self.mode != "disabled" and importlib.util.find_spec("wandb") is None:
            _log.warning("wandb is not installed, so nothing is sent to it. Install it with: pip install wandb")
            return
        self._sweep.mode, self._sweep.reason = resolve_mode(self.mode)
        self._sweep.started = "wandb" in sys.modules  # to be asked for a key it starts its process
        self.pause()

    def record(self, body: dict[str, Any]) -> None:
        """Send one cell; a failing online run is repeated offline, and so are all later ones.

        A failed attempt of a cell that was measured before is not sent: its run shows the measurement.
        """
        if body["status"] not in MEASURED and RecordStore(self.folder).accepted(body["key"]) is not None:
            return
        self._send(cell_run(body, group=self._sweep.name))

    def pause(self) -> None:
        """End wandb's own process, which wakes up fifty times a second also when it has nothing to do.

        Every run is finished then; what is left of wandb would else be waited for when the process ends.
        """
        if self._sweep.started:
            self._sweep.started = False
            restart_service(self.timeout_s)

    def summarise(self, summary: Callable[[], RunSpec]) -> None:
        """Send what `summary` makes of the whole sweep, after `close`; it is not asked if nothing is sent.

        Without a `close` of its own: the line about offline runs covers this one too.
        """
        if self._sweep.mode is None:  # the cells were measured and sent by other processes
            self.open("", 0)
        if self._sweep.mode == "disabled":
            return
        was_online = self._sweep.mode == "online"
        self._send(summary())
        self._finish(tells=was_online)

    def close(self) -> None:
        """Print, if runs were kept offline, the one line that says why, where and how to upload them."""
        self._finish(tells=True)

    def _finish(self, *, tells: bool) -> None:
        sweep = self._sweep
        num_runs, sweep.num_offline = sweep.num_offline, 0
        self.pause()
        if num_runs and tells:
            place = self._place
            runs = "1 run" if num_runs == 1 else f"{num_runs} runs"
            say(
                f"wandb: {runs} kept offline ({sweep.reason}) in {place.files}; "
                f"upload them with: {place.upload_command}"
            )

    def _send(self, spec: RunSpec) -> None:
        sweep = self._sweep
        sweep.started |= sweep.mode != "disabled"
        if sweep.mode == "online":
            try:
                write_run(spec, self._place, "online")
                return
            # wandb raises many kinds: no network, refused key, deleted run, time limit.
            except Exception as error:
                sweep.mode, sweep.reason = "offline", f"the online run failed: {reason_of(error)}"
                restart_service(self.timeout_s)
        if sweep.mode == "offline":
            try:
                write_run(spec, self._place, "offline")
            except Exception:  # wandb's own process may have been killed: once more with a new one
                restart_service(self.timeout_s)
                write_run(spec, self._place, "offline")
            sweep.num_offline += 1

    @property
    def _place(self) -> Place:
        return Place(project=self.project, entity=self.entity, folder=self.folder, timeout_s=self.timeout_s)
