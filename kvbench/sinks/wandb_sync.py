"""Send runs that were not sent yet, one after the other, and count what became of each.

outcome = send_runs([Job(id=..., digest=..., make=...)], place, "online", reached)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvbench.sinks.wandb_run import Online, Place, RunSpec, write_run
from kvbench.sinks.wandb_service import reason_of, restart_service

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
