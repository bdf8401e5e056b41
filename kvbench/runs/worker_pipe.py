"""How a worker talks to its parent, and how it is tied to it; imports nothing heavy."""

from __future__ import annotations

import ctypes
import faulthandler
import json
import logging
import os
import signal
import sys
import time
from typing import Any

_BEAT_EVERY_S = 0.5
_PR_SET_PDEATHSIG = 1
_POISONED = "CUDA error"  # after one of these every later call of the process fails too


class PipeWatcher:
    """Writes one JSON line per event to `descriptor`; each carries the time of the steady clock."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._told_s = 0.0

    def _tell(self, event: str, **content: Any) -> None:
        self._told_s = time.monotonic()
        line = json.dumps({"event": event, "at_s": self._told_s, **content}, allow_nan=False)
        rest = memoryview(line.encode() + b"\n")
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]

    def active(self, key: str, phase: str) -> None:
        """Tell that a phase of a cell begins."""
        self._tell("active", key=key, phase=phase)

    def advance(self, key: str, tasks: float) -> None:
        """Tell that a cell came further."""
        self._tell("advance", key=key, tasks=tasks)

    def beat(self) -> None:
        """Tell of a step, at most twice a second."""
        if time.monotonic() - self._told_s > _BEAT_EVERY_S:
            self._tell("beat")

    def done(self, body: dict[str, Any]) -> None:
        """Tell that a cell ended; a process that CUDA has given up on ends too, and the others get a fresh one."""
        self._tell("done", body=body)
        if body["error"] is not None and _POISONED in body["error"]["message"]:
            self._tell("bye")
            os._exit(0)

    def hello(self, environment: dict[str, Any]) -> None:
        """Say what the numbers are measured on, for records that the parent has to write."""
        self._tell("hello", environment=environment)

    def bye(self) -> None:
        """Tell that all cells are done."""
        self._tell("bye")


def protect(parent: int) -> None:
    """Die with the parent, leave stopping to it, and dump all stacks when something goes wrong."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the call
            os._exit(1)
