"""Writers of a fake sweep in processes of their own, and ways to be bad to them.

python -m tests.trust.crew SCENARIO FOLDER NUM_KILLS SEED      prints one JSON line of counts
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import random
import select
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from kvbench.results.store import RecordStore, leftovers
from tests.trust.fake_sweep import NUM_WRITERS, cells, pretend_elsewhere, write


class Crew:
    """Writers in processes of their own, made by fork; what they say comes through one pipe, whole lines."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self._folder, self._options = folder, options
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        self._buffer = b""
        self.alive: list[int] = []
        self.said: list[tuple[str, str, str]] = []

    def start(self, elsewhere: tuple[str, float, float] | None = None, **options: Any) -> int:
        """Start one writer and return its process number."""
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                random.seed(os.getpid())
                if elsewhere is not None:
                    pretend_elsewhere(*elsewhere)
                write(self._folder, self._say, **{**self._options, **options})
                code = 0
            finally:
                os._exit(code)
        self.alive.append(pid)
        return pid

    def _say(self, *words: object) -> None:
        os.write(self._write, (" ".join(map(str, words)) + "\n").encode())  # below PIPE_BUF: never torn

    def listen(self) -> None:
        """Read what was said so far."""
        while select.select([self._read], [], [], 0)[0]:
            self._buffer += os.read(self._read, 65536)
        *lines, self._buffer = self._buffer.split(b"\n")
        for line in lines:
            what, key, detail = line.decode().split()
            self.said.append((what, key, detail))

    def kill(self, pid: int) -> bool:
        """Send SIGKILL and wait for the end; False if it had ended by itself."""
        os.kill(pid, signal.SIGKILL)
        return self.wait(pid) == -signal.SIGKILL

    def wait(self, pid: int) -> int:
        """Return the exit code of one writer."""
        self.alive.remove(pid)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def reap(self) -> list[int]:
        """Return the exit codes of the writers that ended by themselves."""
        ended = [pid for pid in self.alive if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)]
        return [self.wait(pid) for pid in ended]


def torture(folder: Path, num_kills: int, seed: int, *, scenario: str) -> dict[str, int]:
    """Kill writers of one sweep up to `num_kills` times, let the last ones finish, and return what was seen."""
    rng, names = random.Random(seed), (f"host{number}" for number in itertools.count())
    crew, killed = Crew(folder, pause_s=0.02, lease_s=2.0 if scenario == "skewed clocks" else 60.0), 0
    while True:
        codes = crew.reap()
        assert set(codes) <= {0}, f"a writer failed: {codes}"
        if codes and not crew.alive:
            break
        if not codes:
            for number in range(NUM_WRITERS - len(crew.alive)):
                _start(crew, rng, scenario, number, next(names))
        if killed < num_kills:
            time.sleep(rng.expovariate(1 / 0.02))
            # One writer as if it crashed, or all of them as if the machine went down.
            for pid in list(crew.alive) if rng.random() < 0.2 else [rng.choice(crew.alive)]:
                killed += crew.kill(pid)
        else:
            time.sleep(0.005)
        crew.listen()
    crew.listen()
    return {"killed": killed, **counts(folder, crew.said)}


def _start(crew: Crew, rng: random.Random, scenario: str, number: int, name: str) -> None:
    if scenario == "skewed clocks":
        crew.start(elsewhere=(name, rng.uniform(-600, 600), rng.uniform(0, 10**6)))
    elif scenario == "two sweeps":
        crew.start(sweep=f"sweep {number % 2}")
    else:
        crew.start()


def counts(folder: Path, said: list[tuple[str, str, str]]) -> dict[str, int]:
    """Compare what was acknowledged with what is stored."""
    store, keys = RecordStore(folder), cells()
    accepted = {key: store.accepted(key) for key in keys}
    acknowledged = [(key, attempt) for what, key, attempt in said if what == "committed"]
    stored = {(key, body["attempt"]) for key in keys for body in store.attempts(key)}
    names = [path for path in folder.glob("cells/*/*.json") if not path.name.startswith(".")]
    # A writer killed between its record and the end of its commit leaves batches that `results gc` removes.
    removable = {leftover.path for leftover in leftovers(folder)}
    return {
        "missing": sum(body is None for body in accepted.values()),
        "lost": len(set(acknowledged) - stored),
        "committed_twice": len(acknowledged) - len({key for key, _ in acknowledged}),
        "foreign_cells": len({path.parent.name for path in names} - {key[:16] for key in keys}),
        "torn": len(names) - len(stored) - sum(body is not None for body in accepted.values()),
        "measured_again": sum(n - 1 for n in Counter(said_of(said, "measured")).values()),
        "attempts": len(stored),
        "batches_left": len(set(folder.glob("cells/*/batches")) - removable),
        "claims_left": len(list(folder.glob("claims/*"))),
    }


def said_of(said: list[tuple[str, str, str]], what: str) -> list[tuple[str, str]]:
    """Return key and detail of every line about `what`."""
    return [(key, detail) for name, key, detail in said if name == what]


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    _scenario, _folder, _num_kills, _seed = sys.argv[1:]
    print(json.dumps(torture(Path(_folder), int(_num_kills), int(_seed), scenario=_scenario)))
