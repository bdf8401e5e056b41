"""What a spawned worker runs: read a job, build its cells from their configurations, run them, tell every step.

A job is one JSON line on the standard input; nothing is pickled. What may be said is in `kvbench.sweep.process`. What
takes long to import is imported before the job is looked at, which may not even be known then.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import faulthandler
import gc
import importlib
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kvbench.errors import ConfigError, is_poisoned
from kvbench.sweep.process import LOAD

_PR_SET_PDEATHSIG = 1
_BUSY_FRACTION = 0.01  # of one core, above which a worker that loads is at work ...
_BUSY_BYTES_PER_S = 20_000  # ... or read and written: a slow disk or network takes hours and hardly any processor time


def begin(how: Mapping[str, Any]) -> None:
    """Import what the entry needs, then run its job, or end in silence where there is none after all.

    The job is read meanwhile, so that the parent never waits until it has said it. When anything heavy is imported this
    process dies with its parent, and its beats are heard.
    """
    protect(how["parent"])
    watcher = PipeWatcher(how["messages"], answers=how["answers"], beat_every_s=how["beat_every_s"])
    lines: list[str] = []
    reading = threading.Thread(target=lambda: lines.append(sys.stdin.readline()), name="job", daemon=True)
    reading.start()
    gc.disable()
    entry = importlib.import_module(how["entry"])
    if hasattr(entry, "prepare"):
        entry.prepare(is_awaited=lambda: bool(lines))
    gc.freeze()  # modules stay: looking for waste among them took a sixth of a start, and 0.2 s before every timed task
    gc.enable()
    atexit.register(gc.unfreeze)  # a library's bindings take what is frozen at the end for lost, and say so at length
    reading.join()
    if not lines or not lines[0]:
        os._exit(0)
    job = json.loads(lines[0])
    sys.path[:] = job["path"]
    os.environ.clear()
    os.environ.update(job["environment"])
    _write_to(Path(job["log"]))
    watcher.beat_every_s(job["beat_every_s"])
    entry.main(job, watcher)


def _write_to(log: Path) -> None:
    with log.open("ab") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)


def prepare(is_awaited: Callable[[], bool]) -> None:
    """Import what every worker needs, and what scores text as long as no job waits for it."""
    from kvbench.cli.sweep import quiet_libraries

    quiet_libraries()
    for name in ("kvbench.config.build", "kvbench.results.store", "kvbench.sweep.group"):
        importlib.import_module(name)
    if not is_awaited():
        from kvbench.tasks.rouge import rouge_scores

        rouge_scores(prediction="a word", reference="another")  # its libraries come when they are used


def main(job: dict[str, Any], watcher: PipeWatcher) -> None:
    """Run the job, one group, and end the process without waiting for anything that a library left running."""
    from omegaconf import OmegaConf

    from kvbench.config.build import build_cells
    from kvbench.config.compose import Composed
    from kvbench.results.store import PartialStore
    from kvbench.sweep.group import GroupPlan, ModelShelf, run_group

    specs = [Composed(config=OmegaConf.create(spec["config"]), choices=spec["choices"]) for spec in job["cells"]]
    cells = build_cells(specs)
    if [cell.key for cell in cells] != job["keys"]:
        raise ConfigError("the cells changed while the sweep ran (code, checkpoint or data); start it again")
    results = Path(job["results"])
    plan = GroupPlan(
        results=results,
        sweep=job["sweep"],
        share_prompts=job["share_prompts"],
        num_workers=job["num_workers"],
        batches_of=lambda key: PartialStore(results, key),
    )
    watcher.hello(cells[0].environment())
    run_group(cells, plan, shelf=ModelShelf(), watcher=watcher)
    watcher.bye()
    os._exit(0)


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


class PipeWatcher:
    """Writes one line per event to `messages`; each carries the time of the steady clock.

    answers: where the parent's byte is read. beat_every_s: how often a worker at work has to say so; more
    would wake the parent for nothing. From the start to the first phase after `load` there are no steps to tell
    of, so a thread tells of the CPU time that loading takes and the bytes that it moves: what waits for ever does
    neither.
    """

    def __init__(
        self, messages: int, *, answers: int, beat_every_s: float, cpu_s: Callable[[], float] = time.process_time
    ) -> None:
        self._messages, self._answers = messages, answers
        self._beat_every_s = beat_every_s
        self._told_s = 0.0
        self._lock = threading.Lock()
        self._loading = Loading(self.beat, every_s=beat_every_s, cpu_s=cpu_s)
        self._loading.start()

    def beat_every_s(self, time_s: float) -> None:
        """From now on beat as often as the limits ask for, which may come later than the first beats."""
        self._beat_every_s = self._loading.every_s = time_s

    def _tell(self, event: str, **content: Any) -> None:
        with self._lock:
            self._told_s = time.monotonic()
            line = json.dumps({"event": event, "at_s": self._told_s, **content}, allow_nan=False)
            # The first line end closes whatever somebody else has begun to write.
            rest = memoryview(b"\n" + line.encode() + b"\n")
            while rest:
                rest = rest[os.write(self._messages, rest) :]

    def active(self, key: str, phase: str, *, timed: bool = False) -> None:
        """Tell that a phase of a cell begins; return from a timed one when nothing of the sweep works beside it."""
        if phase != LOAD:
            self._loading.stop()
        self._tell("active", key=key, phase=phase, timed=timed)
        if timed:
            with contextlib.suppress(OSError):  # closed by what runs here: then nobody can be waited for
                os.read(self._answers, 1)

    def advance(self, key: str, tasks: float) -> None:
        """Tell that a cell came further."""
        self._tell("advance", key=key, tasks=tasks)

    def batches(self, key: str, done: int, total: int) -> None:
        """Tell how many batches of a cell are done."""
        self._tell("batches", key=key, done=done, total=total)

    def beat(self) -> None:
        """Tell of a step, unless something was told within `beat_every_s`."""
        if time.monotonic() - self._told_s >= self._beat_every_s:
            self._tell("beat")

    def done(self, body: dict[str, Any]) -> None:
        """Tell that a cell ended; a process that CUDA has given up on ends too, and the others get a fresh one."""
        self._tell("done", body=body)
        if body["error"] is not None and is_poisoned(body["error"]["message"]):
            self._tell("bye")
            os._exit(0)

    def hello(self, environment: dict[str, Any]) -> None:
        """Say what the numbers are measured on, for records that the parent has to write."""
        self._tell("hello", environment=environment)

    def bye(self) -> None:
        """Tell that all cells are done, or that the rest needs a fresh process."""
        self._loading.stop()
        self._tell("bye")


def moved_bytes() -> int:
    """Return what this process has read and written so far, pages of mapped files too; 0 where nothing tells."""
    try:
        counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text(encoding="ascii").splitlines())
        return sum(int(counts[name]) for name in ("rchar", "wchar", "read_bytes"))
    except (OSError, ValueError, KeyError):
        return 0


class Loading(threading.Thread):
    """Calls `beat` every `every_s` in which this process used CPU time or moved bytes, until it is stopped."""

    def __init__(
        self,
        beat: Callable[[], None],
        *,
        every_s: float,
        cpu_s: Callable[[], float],
        moved: Callable[[], int] = moved_bytes,
    ) -> None:
        super().__init__(name="loading", daemon=True)
        self._beat, self.every_s, self._cpu_s, self._moved = beat, every_s, cpu_s, moved
        self._used_s, self._moved_bytes = cpu_s(), moved()
        self._stopped = threading.Event()

    def run(self) -> None:
        """Look from time to time."""
        while not self._stopped.wait(self.every_s):
            self.look()

    def look(self) -> None:
        """Call `beat` if the process worked since the last look."""
        used_s, bytes_now = self._cpu_s(), self._moved()
        is_busy = used_s - self._used_s > _BUSY_FRACTION * self.every_s
        if is_busy or bytes_now - self._moved_bytes > _BUSY_BYTES_PER_S * self.every_s:
            self._beat()
        self._used_s, self._moved_bytes = used_s, bytes_now

    def stop(self) -> None:
        """End; when this returns nothing runs beside the caller any more."""
        if not self._stopped.is_set():
            self._stopped.set()
            self.join()
