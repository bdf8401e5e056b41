"""Send runs that were not sent yet, one after the other, and count what became of each.

outcome = send_runs([Job(id=..., digest=..., make=...)], place, "online", reached)

What was sent to W&B already: one small sealed file per run, content and destination.

    <folder>/wandb/sent/<run id>-<digest>.json

A file is written once and never changed, so any number of processes may note what they sent. Losing
these files costs a second upload, which lands on the same runs.

Which cells a sweep had when its summary was sent: those it measured and those it found measured before.

    <folder>/wandb/sweeps/<id of the summary run>.json

A record names the sweep that measured it, and no later one that used it. Losing these files costs the latter.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import shlex
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvbench.errors import ConfigError, KvbenchError, RecordError, close_matches
from kvbench.results.files import replace_file, seal, unseal
from kvbench.results.record import MEASURED
from kvbench.results.store import RecordStore
from kvbench.sinks.console import say
from kvbench.sinks.wandb.content import cell_run
from kvbench.sinks.wandb.run import (
    MODES,
    Mode,
    Online,
    Place,
    RunSpec,
    check_online,
    check_project,
    reason_of,
    resolve_mode,
    restart_service,
    write_run,
)

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
            if _sent(job, place, mode, outcome):
                outcome.sent[job.what] = outcome.sent.get(job.what, 0) + 1
                in_a_row = 0
            elif time.monotonic() - start_s > 0.5 * place.timeout_s:
                in_a_row += 1
        reached()
        if in_a_row == _HOPELESS:
            outcome.num_left = len(jobs) - number - 1
            break
    if outcome.sent or outcome.failures:
        restart_service(place.timeout_s)
    return outcome


def _sent(job: Job, place: Place, mode: Online, outcome: Outcome) -> bool:
    try:
        write_run(job.make(), place, mode)
    # wandb raises many kinds: no network, refused key, deleted run, time limit.
    except Exception as error:
        outcome.failures.append(f"{job.id}: {reason_of(error)}")
        restart_service(place.timeout_s)
        return False
    return True


_KIND, _VERSION = "kvbench_wandb_sweep", 1


def note_sweep(folder: Path, run_id: str, sweep: str, keys: Collection[str]) -> None:
    """Keep which cells the summary `run_id` of `sweep` shows; a disk that refuses costs the note."""
    with contextlib.suppress(OSError, KvbenchError):
        replace_file(
            _place(folder) / f"{run_id}.json",
            seal(_KIND, _VERSION, {"sweep": sweep, "keys": sorted(keys)}),
        )


def cells_of_sweep(folder: Path, sweep: str, measured: Collection[str], is_there: Callable[[str], bool]) -> list[str]:
    """Return the keys of the largest noted sweep of that name that has all of `measured` and whose cells are all there.

    Without such a note, `measured` themselves.
    """
    best = sorted(measured)
    for path in sorted(_place(folder).glob("*.json")):
        with contextlib.suppress(RecordError):
            body = unseal(path, _KIND, _VERSION, "Delete it.")
            if body["sweep"] == sweep and set(measured) <= set(body["keys"]) and all(map(is_there, body["keys"])):
                best = max(best, body["keys"], key=len)
    return best


def _place(folder: Path) -> Path:
    return folder / "wandb" / "sweeps"


_LONGEST_TIMEOUT_S = 30.0
_log = logging.getLogger(__name__)


@dataclass
class _Sweep:
    """What changes while a sweep runs; the sink itself stays frozen."""

    name: str = ""
    mode: Mode | None = None  # not decided before the first sweep
    reason: str = ""
    num_offline: int = 0
    started: bool = False

    def restart(self, name: str, mode: Mode, reason: str) -> None:
        self.name, self.mode, self.reason, self.num_offline, self.started = name, mode, reason, 0, False


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
        if self.mode not in MODES:
            raise ConfigError(f"sink.wandb.mode is {self.mode!r}; {close_matches(self.mode, MODES)}")
        if not 0 < self.timeout_s <= _LONGEST_TIMEOUT_S:
            raise ConfigError(f"sink.wandb.timeout_s is {self.timeout_s:g}; it must lie in (0, {_LONGEST_TIMEOUT_S:g}]")
        check_project(self.project, "sink.wandb.project")
        if self.mode == "online":
            check_online()
        object.__setattr__(self, "folder", Path(self.folder))  # yaml gives text

    def open(self, sweep: str, num_cells: int) -> None:
        """Decide the mode for `sweep`; a missing wandb package is one warning line."""
        self._sweep.restart(sweep, "disabled", "")
        if self.mode != "disabled" and importlib.util.find_spec("wandb") is None:
            _log.warning("wandb is not installed, so nothing is sent to it. Install it with: pip install wandb")
            return
        self._sweep.restart(sweep, *resolve_mode(self.mode))
        self._sweep.started = "wandb" in sys.modules  # to be asked for a key it starts its process
        self._end_service()

    def record(self, body: dict[str, Any]) -> None:
        """Send one cell; a failing online run is repeated offline, and so are all later ones.

        A failed attempt of a cell that was measured before is not sent: its run shows the measurement.
        """
        if body["status"] not in MEASURED and RecordStore(self.folder).accepted(body["key"]) is not None:
            return
        self._send(cell_run(body, group=self._sweep.name))

    def pause(self) -> None:
        """End wandb's own process, which wakes up fifty times a second also when it has nothing to do."""
        self._end_service()

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
        num_runs, self._sweep.num_offline = self._sweep.num_offline, 0
        self._end_service()
        if num_runs and was_online:
            self._say_offline(num_runs)

    def close(self) -> None:
        """Print, if runs were kept offline, the one line that says why, where and how to upload them."""
        num_runs, self._sweep.num_offline = self._sweep.num_offline, 0
        self._end_service()
        if num_runs:
            self._say_offline(num_runs)

    def _send(self, spec: RunSpec) -> None:
        if self._sweep.mode == "online":
            try:
                self._write(spec, "online")
                return
            # wandb raises many kinds: no network, refused key, deleted run, time limit.
            except Exception as error:
                self._sweep.mode, self._sweep.reason = "offline", f"the online run failed: {reason_of(error)}"
                restart_service(self.timeout_s)
        if self._sweep.mode == "offline":
            self._write_offline(spec)
            self._sweep.num_offline += 1

    def _write_offline(self, spec: RunSpec) -> None:
        """Write the run; if wandb's own process was killed, once more with a new one."""
        try:
            self._write(spec, "offline")
        except Exception:
            restart_service(self.timeout_s)
            self._write(spec, "offline")

    def _write(self, spec: RunSpec, mode: Online) -> None:
        self._sweep.started = True
        place = Place(project=self.project, entity=self.entity, folder=self.folder, timeout_s=self.timeout_s)
        write_run(spec, place, mode)

    def _end_service(self) -> None:
        """Every run is finished; what is left of wandb would else be waited for when the process ends."""
        if self._sweep.started:
            self._sweep.started = False
            restart_service(self.timeout_s)

    def _say_offline(self, num_runs: int) -> None:
        folder = (self.folder / "wandb").resolve()
        command = f"wandb sync {shlex.quote(str(folder))}/offline-run-*"
        reason = self._sweep.reason
        say(f"wandb: {num_runs} runs kept offline ({reason}) in {folder}; upload them with: {command}")
