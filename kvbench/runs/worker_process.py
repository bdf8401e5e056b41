"""The parent's side of one worker: start it, read what it says, stop it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvbench.durable import make_folder
from kvbench.runs.oom_kills import num_oom_kills
from kvbench.runs.verdict import Verdict, verdict_on
from kvbench.runs.watchdog import Limits, Watchdog

_START = (
    "import importlib, json, sys; job = json.loads(sys.stdin.readline()); sys.path[:] = job['path']; "
    "importlib.import_module(job['entry']).main(job)"
)
_DUMP_S = 1.0
_TAIL_BYTES = 8192


class WorkerProcess:
    """One spawned process with a group of cells; `keys` are those that have not ended yet."""

    def __init__(
        self, job: Mapping[str, Any], *, keys: Sequence[str], limits: Limits, log: Path, environment: Mapping[str, str]
    ) -> None:
        self.keys = list(keys)
        self.watchdog = Watchdog(limits=limits, now_s=time.monotonic())
        self.complaint: str | None = None
        self.said_goodbye = False
        self.ended = False
        self.environment: dict[str, Any] = {}
        self._log = log
        self._oom_kills = num_oom_kills()
        self._rest = b""
        make_folder(log.parent)
        self.messages, theirs = os.pipe()
        os.set_blocking(self.messages, False)
        try:
            self._process = self._spawn(theirs, environment)
        finally:
            os.close(theirs)
        text = json.dumps({**job, "path": sys.path, "parent": os.getpid(), "messages": theirs})
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._process.stdin as pipe:  # its end is noticed as any other
            pipe.write(text.encode() + b"\n")

    def _spawn(self, theirs: int, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-c", _START],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=(theirs,),
                start_new_session=True,  # Ctrl-C reaches the parent, which decides
                env={**os.environ, **environment},
            )

    def read(self) -> Iterator[dict[str, Any]]:
        """Yield the messages that are there now, and see whether the process is gone."""
        gone = self._process.poll() is not None  # before reading, so that nothing said can be missed
        *lines, self._rest = (self._rest + self._available()).split(b"\n")
        for line in lines:
            with contextlib.suppress(ValueError):  # a policy that writes to every open file
                message: dict[str, Any] = json.loads(line)
                self._note(message)
                yield message
        self.ended = gone

    def _available(self) -> bytes:
        chunks = []
        with contextlib.suppress(BlockingIOError):
            while chunk := os.read(self.messages, 2**20):
                chunks.append(chunk)
        return b"".join(chunks)

    def _note(self, message: Mapping[str, Any]) -> None:
        at_s = message["at_s"]
        if message["event"] == "active":
            self.watchdog.start(message["key"], message["phase"], at_s)
        elif message["event"] == "done":
            self.watchdog.end(at_s)
            self.keys.remove(message["body"]["key"])
        else:
            self.watchdog.hear(at_s)
        self.environment = message.get("environment", self.environment)
        self.said_goodbye = self.said_goodbye or message["event"] == "bye"

    def stop_if_stuck(self) -> None:
        """Dump the stacks of a worker that is over a limit, and kill it."""
        if self.complaint is None:
            self.complaint = self.watchdog.complaint(time.monotonic())
            if self.complaint is not None:
                self._signal(signal.SIGUSR1)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(_DUMP_S)
                self.kill()

    def kill(self) -> None:
        """Kill the worker and whatever it started."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def close(self) -> None:
        """Wait for the end and let the pipe go."""
        self.kill()
        self._process.wait()
        os.close(self.messages)

    def verdict(self) -> Verdict:
        """Return what the end in the middle of a cell means."""
        now = num_oom_kills()
        new = now - self._oom_kills if now is not None and self._oom_kills is not None else 0
        assert self._process.returncode is not None
        return verdict_on(self._process.returncode, complaint=self.complaint, oom_kills=new)

    def last_words(self) -> str:
        """Return the end of what it wrote to its log: warnings, a Python traceback, dumped stacks."""
        try:
            raw = self._log.read_bytes()[-_TAIL_BYTES:]
        except OSError:
            return ""
        return raw.decode(errors="replace")
