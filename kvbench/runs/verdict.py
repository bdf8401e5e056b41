"""What the end of a worker in the middle of a cell means."""

from __future__ import annotations

import signal
from dataclasses import dataclass

_FAULTS = {signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP, signal.SIGSYS}
RETRIED = ("killed", "oom")


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A status, and what to say about it."""

    status: str
    kind: str
    message: str


def verdict_on(returncode: int, *, complaint: str | None, oom_kills: int) -> Verdict:
    """Judge by the exit code (negative: a signal), the watchdog's complaint and new kills for memory."""
    if complaint is not None:
        return Verdict(status="timeout", kind="Timeout", message=f"stopped by the watchdog: {complaint}")
    if returncode >= 0:
        text = f"the worker process ended with exit code {returncode} in the middle of the cell"
        return Verdict(status="crash", kind="ProcessExit", message=text)
    number = -returncode
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    if number == signal.SIGKILL and oom_kills > 0:
        text = "the kernel killed the worker process for memory (oom_kill of its control group rose)"
        return Verdict(status="oom", kind="HostOutOfMemory", message=text)
    text = f"the worker process was ended by {name}"
    return Verdict(status="crash" if number in _FAULTS else "killed", kind=name, message=text)
