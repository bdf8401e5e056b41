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
import hashlib
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kvbench.errors import KvbenchError, RecordError
from kvbench.results.files import replace_file, seal, unseal, write_new
from kvbench.sinks.wandb.run import Online, Place, RunSpec, reason_of, restart_service, write_run

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


_KIND, _VERSION = "kvbench_wandb_sent", 1


def is_sent(folder: Path, target: str, run_id: str, digest: str) -> bool:
    """Tell whether content of `digest` was sent as `run_id` to `target`; a damaged file counts as not sent."""
    try:
        body = unseal(_path(folder, target, run_id, digest), _KIND, _VERSION, "Delete it; the run is sent again.")
    except RecordError:
        return False
    return body == _body(target, run_id, digest)


def note_sent(folder: Path, target: str, run_id: str, digest: str) -> None:
    """Keep that content of `digest` was sent as `run_id` to `target`; a disk that refuses costs a second upload."""
    path, data = _path(folder, target, run_id, digest), seal(_KIND, _VERSION, _body(target, run_id, digest))
    with contextlib.suppress(OSError):
        if path.exists() and path.read_bytes() != data:
            path.unlink()
    with contextlib.suppress(OSError, KvbenchError):
        write_new(path, data)


def _path(folder: Path, target: str, run_id: str, digest: str) -> Path:
    name = hashlib.sha256(f"{target}\n{digest}".encode()).hexdigest()[:16]
    return folder / "wandb" / "sent" / f"{run_id}-{name}.json"


def _body(target: str, run_id: str, digest: str) -> dict[str, str]:
    # A server's URL may hold a password.
    return {"target": hashlib.sha256(target.encode()).hexdigest(), "run": run_id, "digest": digest}


_WANDB_SWEEPS_KIND, _WANDB_SWEEPS_VERSION = "kvbench_wandb_sweep", 1


def note_sweep(folder: Path, run_id: str, sweep: str, keys: Collection[str]) -> None:
    """Keep which cells the summary `run_id` of `sweep` shows; a disk that refuses costs the note."""
    with contextlib.suppress(OSError, KvbenchError):
        replace_file(
            _place(folder) / f"{run_id}.json",
            seal(_WANDB_SWEEPS_KIND, _WANDB_SWEEPS_VERSION, {"sweep": sweep, "keys": sorted(keys)}),
        )


def cells_of_sweep(folder: Path, sweep: str, measured: Collection[str], is_there: Callable[[str], bool]) -> list[str]:
    """Return the keys of the largest noted sweep of that name that has all of `measured` and whose cells are all there.

    Without such a note, `measured` themselves.
    """
    best = sorted(measured)
    for path in sorted(_place(folder).glob("*.json")):
        with contextlib.suppress(RecordError):
            body = unseal(path, _WANDB_SWEEPS_KIND, _WANDB_SWEEPS_VERSION, "Delete it.")
            if body["sweep"] == sweep and set(measured) <= set(body["keys"]) and all(map(is_there, body["keys"])):
                best = max(best, body["keys"], key=len)
    return best


def _place(folder: Path) -> Path:
    return folder / "wandb" / "sweeps"
