"""The parent's side of one worker: how both talk, starting and stopping it, and what its end means.

Importing what every worker needs takes longer than most of what it then does, so a process may begin before anybody
knows its job (`Begun`, kept in a `Reserve`): it imports, and waits for the one line that says it. A worker that is
given one goes on from there; any other is begun then. Which of both it was makes no difference to what it does.

A worker says what it does, one JSON object a line. The parent says one thing only: a byte, when nothing of the sweep
works beside the worker, so that it may begin to time. Whatever else shares the process, a policy that writes to every
open file among it, can put anything on the pipe: `message_of` takes what a worker can mean. `WorkerProcess` is the
process. Its `Watchdog` decides, from the times that the worker's own messages carry, whether it is too slow with a cell
or silent. `verdict_on` says what its end in the middle of a cell means, and `num_oom_kills` how often the kernel killed
for memory. Imports nothing heavy.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvbench.results.files import make_folder

GO = b"g"
LOAD = "load"
RETRIED = ("killed", "oom")
_MOST = 1e300
_CONTENT: dict[str, dict[str, type]] = {
    "hello": {"environment": dict},
    "active": {"key": str, "phase": str, "timed": bool},
    "advance": {"key": str, "tasks": float},
    "batches": {"key": str, "done": int, "total": int},
    "beat": {},
    "done": {"body": dict},
    "bye": {},
}


def message_of(line: bytes) -> dict[str, Any] | None:
    """Return the message in a line of the pipe, None for what no worker says."""
    try:
        message = json.loads(line, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    if not isinstance(message, dict):
        return None
    content = _CONTENT.get(str(message.get("event")))
    if content is None or not _is(message.get("at_s"), float):
        return None
    return message if all(_is(message.get(name), kind) for name, kind in content.items()) else None


def _is(value: object, kind: type) -> bool:
    if kind is float:  # no NaN, and nothing that arithmetic with a float could not hold
        return isinstance(value, int | float) and not isinstance(value, bool) and -_MOST < value < _MOST
    return isinstance(value, kind)


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no number of JSON")


_START = (
    "import importlib, json, sys; how = json.loads(sys.argv[1]); sys.path[:] = how['path']; "
    "importlib.import_module('kvbench.sweep.worker').begin(how)"
)
ENTRY = "kvbench.sweep.worker"  # whose `main` a worker runs
_EARLY_BEAT_S = 1.0  # of a process whose limits nobody knows yet
_DUMP_S = 1.0
_TAIL_BYTES = 8192
_ABOUT_A_CELL = ("active", "advance")
_LOOK_AGAIN_S = 1.0  # where the kernel does not tell of a process's end
_SOON_S = 0.05  # there, after the pipe's end


class Begun:
    """A spawned process that imports what every worker needs, and waits for its job.

    entry: the module whose `main` it will run. environment: variables of the slot it is for. log: where it writes,
    nowhere if not given.
    """

    def __init__(
        self,
        environment: Mapping[str, str],
        *,
        entry: str = ENTRY,
        beat_every_s: float = _EARLY_BEAT_S,
        log: Path | None = None,
    ) -> None:
        self.slot = dict(environment)
        self.entry = entry
        self.messages, theirs = os.pipe()
        answers, self.answers = os.pipe()
        os.set_blocking(self.messages, False)
        self.ends = {"messages": theirs, "answers": answers}
        how = {**self.ends, "beat_every_s": beat_every_s, "path": sys.path, "parent": os.getpid(), "entry": entry}
        try:
            with Path(os.devnull if log is None else log).open("ab") as written:
                self.process = subprocess.Popen(
                    [sys.executable, "-c", _START, json.dumps(how)],
                    stdin=subprocess.PIPE,
                    stdout=written,
                    stderr=written,
                    pass_fds=(theirs, answers),
                    start_new_session=True,  # Ctrl-C reaches the parent, which decides
                    env={**os.environ, **environment},
                )
        finally:
            os.close(theirs)
            os.close(answers)

    @property
    def is_alive(self) -> bool:
        """Whether it can still be given a job."""
        return self.process.poll() is None

    def give(self, job: Mapping[str, Any]) -> None:
        """Say the job; that it has ended by then is noticed as any end is."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self.process.stdin as pipe:
            pipe.write(json.dumps({**job, **self.ends}).encode() + b"\n")

    def end(self) -> None:
        """Kill it, which has done nothing yet, and let the pipes go."""
        self.process.kill()
        self.process.wait()
        assert self.process.stdin is not None
        self.process.stdin.close()
        os.close(self.messages)
        os.close(self.answers)


class Reserve:
    """Processes that have begun and have no job yet."""

    def __init__(self) -> None:
        self._begun: list[Begun] = []

    def begin(self, environment: Mapping[str, str], *, entry: str = ENTRY) -> None:
        """Let one begin, for a worker of a slot with this environment."""
        self._begun.append(Begun(environment, entry=entry))

    def num_for(self, environment: Mapping[str, str]) -> int:
        """Return how many there are for a slot."""
        return sum(begun.slot == environment for begun in self._begun)

    def __len__(self) -> int:
        return len(self._begun)

    def take(self, environment: Mapping[str, str], *, entry: str = ENTRY) -> Begun | None:
        """Return one for a slot, which is the caller's now; None if there is none. One that has died is let go."""
        for begun in [one for one in self._begun if (one.slot, one.entry) == (environment, entry)]:
            self._begun.remove(begun)
            if begun.is_alive:
                return begun
            begun.end()
        return None

    def keep(self, environments: Collection[Mapping[str, str]] = ()) -> None:
        """End, quietly, those that are for no slot with one of these environments."""
        for begun in [one for one in self._begun if one.slot not in environments]:
            self._begun.remove(begun)
            begun.end()

    def close(self) -> None:
        """End all."""
        self.keep()


class WorkerProcess:
    """One spawned process with a group of cells; `keys` are those that have not ended yet.

    num_ended: cells that it brought to their end. is_timing: whether nothing else may work now.
    """

    def __init__(
        self,
        job: Mapping[str, Any],
        *,
        keys: Sequence[str],
        limits: Limits,
        log: Path,
        environment: Mapping[str, str],
        begun: Begun | None = None,
    ) -> None:
        self.keys = list(keys)
        self.watchdog = Watchdog(limits=limits, now_s=time.monotonic())
        self.complaint: str | None = None
        self.said_goodbye = False
        self.ended = False
        self.num_ended = 0
        self.is_timing = False
        self.environment: dict[str, Any] = {}
        self._given = tuple(keys)
        self._log = log
        self._oom_kills = num_oom_kills()
        self._rest = b""
        self._is_silenced = False
        make_folder(log.parent)
        with log.open("ab") as file:
            self._log_start = os.fstat(file.fileno()).st_size  # what stands there is of an earlier attempt
        if begun is None:
            begun = Begun(environment, entry=job["entry"], beat_every_s=limits.beat_every_s, log=log)
        self._process, self._messages, self._answers = begun.process, begun.messages, begun.answers
        self._exit = _exit_descriptor(self._process.pid)
        its_own = {"environment": {**os.environ, **environment}, "log": str(log.absolute()), "path": sys.path}
        begun.give({**job, **its_own, "beat_every_s": limits.beat_every_s})

    @property
    def descriptors(self) -> set[int]:
        """What becomes readable when the worker has said something, or has ended."""
        found = set() if self._is_silenced else {self._messages}
        return found if self._exit is None else found | {self._exit}

    def deadline_s(self) -> float | None:
        """Return when to look at the worker although nothing became readable; None for never."""
        deadline_s = None if self.complaint is not None else self.watchdog.deadline_s()
        if self._exit is not None:
            return deadline_s
        again_s = time.monotonic() + (_SOON_S if self._is_silenced else _LOOK_AGAIN_S)
        return again_s if deadline_s is None else min(again_s, deadline_s)

    def read(self) -> Iterator[dict[str, Any]]:
        """Yield the messages that are there now, and see whether the process is gone."""
        gone = self._process.poll() is not None  # before reading, so that nothing said can be missed
        *lines, self._rest = (self._rest + self._available()).split(b"\n")
        for line in lines:
            message = message_of(line)
            if message is not None and self._is_mine(message):
                self._note(message)
                yield message
        if gone and not self.ended:
            self.watchdog.hear(time.monotonic())  # the time up to its death belongs to the active cell
        self.ended = gone

    def _available(self) -> bytes:
        chunks = []
        with contextlib.suppress(BlockingIOError):
            while chunk := os.read(self._messages, 2**20):
                chunks.append(chunk)
            self._is_silenced = True  # nobody holds the other end any more
        return b"".join(chunks)

    def _is_mine(self, message: Mapping[str, Any]) -> bool:
        """Whether the message is about cells of this worker, and not from the future."""
        if message["at_s"] > time.monotonic():
            return False
        if message["event"] == "done":
            return message["body"].get("key") in self.keys
        return message["event"] not in _ABOUT_A_CELL or message["key"] in self._given

    def _note(self, message: Mapping[str, Any]) -> None:
        event, at_s = message["event"], message["at_s"]
        if event == "active":
            self.is_timing = False
            self.watchdog.start(message["key"], message["phase"], at_s)
            if message["timed"]:
                self.watchdog.wait()
        elif event == "done":
            self.is_timing = False
            self.watchdog.end(at_s)
            self.num_ended += 1
            self.keys.remove(message["body"]["key"])
        else:
            self.watchdog.hear(at_s)
        self.environment = message.get("environment", self.environment)
        self.said_goodbye = self.said_goodbye or event == "bye"

    @property
    def active(self) -> tuple[str, str] | None:
        """The cell that has not ended and its phase, to which time and a death belong; None between cells."""
        active = self.watchdog.active
        return active if active is not None and active[0] in self.keys else None

    @property
    def computes(self) -> bool:
        """Whether it has loaded all it needs and works on a cell."""
        return self.active is not None and self.active[1] != LOAD

    @property
    def waits(self) -> bool:
        """Whether it is about to time something and waits until nothing else works."""
        return self.watchdog.waits

    def go(self) -> None:
        """Let it begin to time."""
        self.is_timing = True
        self.watchdog.resume(time.monotonic())
        with contextlib.suppress(BrokenPipeError):  # its end is noticed as any other
            os.write(self._answers, GO)

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
        """Wait for the end and let the pipes go."""
        self.kill()
        self._process.wait()
        for descriptor in (self._messages, self._answers, self._exit):
            if descriptor is not None:
                os.close(descriptor)

    def verdict(self) -> Verdict:
        """Return what the end in the middle of a cell means."""
        now = num_oom_kills()
        new = now - self._oom_kills if now is not None and self._oom_kills is not None else 0
        assert self._process.returncode is not None
        return verdict_on(self._process.returncode, complaint=self.complaint, oom_kills=new)

    def last_words(self) -> str:
        """Return the end of what it wrote to its log: warnings, a Python traceback, dumped stacks."""
        try:
            with self._log.open("rb") as log:
                size = log.seek(0, os.SEEK_END)
                log.seek(max(min(self._log_start, size), size - _TAIL_BYTES))
                return log.read().decode(errors="replace")
        except OSError:
            return ""


def _exit_descriptor(process: int) -> int | None:
    """Return what becomes readable when `process` ends; None where the kernel has no such thing."""
    if not hasattr(os, "pidfd_open"):
        return None
    try:
        return os.pidfd_open(process)
    except OSError:  # an old kernel, or a container that forbids the call
        return None


_SELDOM_S = 60.0
_BEATS_PER_SILENCE = 20


@dataclass(frozen=True, kw_only=True)
class Limits:
    """timeout_s: time that one cell may take in all; silence_s: time without any step. None: no limit."""

    timeout_s: float | None
    silence_s: float | None

    @property
    def beat_every_s(self) -> float:
        """How often a worker has to say that it works: often enough to be believed, and no more than once a minute."""
        return _SELDOM_S if self.silence_s is None else min(_SELDOM_S, self.silence_s / _BEATS_PER_SILENCE)


@dataclass(kw_only=True)
class Watchdog:
    """Follows one worker; times are those of the machine's steady clock, in seconds."""

    limits: Limits
    now_s: float
    spent_s: dict[str, float] = field(default_factory=dict)
    active: tuple[str, str] | None = None
    waits: bool = False
    waits_from_s: float = 0.0

    def __post_init__(self) -> None:
        self._heard_s = self._counted_s = self.now_s

    def hear(self, at_s: float) -> None:
        """Note a message: the time since the last one belongs to the active cell."""
        if self.active is not None:
            key = self.active[0]
            self.spent_s[key] = self.spent_s.get(key, 0.0) + max(0.0, at_s - self._counted_s)
        self._heard_s, self._counted_s = max(at_s, self._heard_s), at_s

    def start(self, key: str, phase: str, at_s: float) -> None:
        """Note that `phase` of the cell `key` begins."""
        self.hear(at_s)
        self.active, self.waits = (key, phase), False

    def end(self, at_s: float) -> None:
        """Note that no cell is active."""
        self.hear(at_s)
        self.active, self.waits = None, False

    def wait(self) -> None:
        """Note that the worker waits for its parent: until `resume` no time is its own."""
        self.waits, self.waits_from_s = True, self._heard_s

    def resume(self, now_s: float) -> None:
        """Note that the parent has answered."""
        self.waits = False
        self._heard_s = self._counted_s = now_s

    def deadline_s(self) -> float | None:
        """Return the time after which `complaint` has something to say if nothing more is heard; None for never."""
        if self.waits:
            return None
        times = [] if self.limits.silence_s is None else [self._heard_s + self.limits.silence_s]
        if self.active is not None and self.limits.timeout_s is not None:
            times.append(self._counted_s + self.limits.timeout_s - self.spent_s.get(self.active[0], 0.0))
        return min(times, default=None)

    def complaint(self, now_s: float) -> str | None:
        """Return why the worker must go, or None."""
        if self.waits:
            return None
        silent_s = now_s - self._heard_s
        if self.limits.silence_s is not None and silent_s > self.limits.silence_s:
            return (
                f"no step for {silent_s:.0f} s; the limit is silence_s={self.limits.silence_s:g}; if it was at work, "
                "raise worker.silence_s"
            )
        if self.active is None or self.limits.timeout_s is None:
            return None
        spent_s = self.spent_s.get(self.active[0], 0.0) + now_s - self._counted_s
        if spent_s > self.limits.timeout_s:
            return f"{spent_s:.0f} s in this cell; the limit is timeout_s={self.limits.timeout_s:g}"
        return None


def gpu_slots(num_gpus: int, visible: str | None) -> list[dict[str, str]]:
    """Return the environment of one worker per GPU; `visible` is what this process was given itself."""
    names = visible.split(",") if visible else [str(number) for number in range(num_gpus)]
    return [{"CUDA_VISIBLE_DEVICES": name} for name in names[:num_gpus]] if num_gpus > 1 else [{}]


_FAULTS = {signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP, signal.SIGSYS}


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


_CGROUP = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")
_WHOLE_MACHINE = Path("/proc/vmstat")
_COUNT = re.compile(r"^oom_kill (\d+)$", re.MULTILINE)


def num_oom_kills(
    *, cgroup: Path = _CGROUP, membership: Path = _MEMBERSHIP, whole_machine: Path = _WHOLE_MACHINE
) -> int | None:
    """Return the counter of the nearest group that has one (cgroup v2, then v1), else the machine's, else None."""
    found = (_COUNT.search(_text(path)) for path in (*_counters(cgroup, membership), whole_machine))
    return next((int(count[1]) for count in found if count is not None), None)


def _counters(cgroup: Path, membership: Path) -> list[Path]:
    """Files to look at. In a container the path told may not exist; its own group is then the root."""
    paths = []
    for line in _text(membership).splitlines():
        _, _, rest = line.partition(":")
        controllers, _, own = rest.partition(":")
        if controllers == "":
            paths += [cgroup / own.strip("/") / "memory.events", cgroup / "memory.events"]
        elif "memory" in controllers.split(","):
            folder = cgroup / "memory"
            paths += [folder / own.strip("/") / "memory.oom_control", folder / "memory.oom_control"]
    return paths


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
