"""Who measures which cell, when several processes or machines share one results folder.

    results/claims/<key[:16]>.<generation>     the lease of one owner on one cell

A claim is a lease: its owner counts up a number in its own file, and whoever sees that number stand
still for `lease_s` seconds of its own steady clock may take over. Clocks of two machines are never
compared. An owner that died on this machine is known at once. A lost race costs time, never truth:
the record store accepts one attempt per cell whatever the claims say.

    claims = Claims(Path("results"))
    claim = claims.take(key)
    if claim is not None:
        with claim.beating():
            ...
        claim.release()

Exactly one wins: a taker links its file to the next generation's name, which fails if that exists, and
gives it back unless what it saw before is still there.

The file is text of one line: a beat count of fixed width, which the owner overwrites in place, then JSON that never
changes. Whoever looks compares the bytes; the JSON says, for an owner on this machine, whether it died.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from kvbench.results.files import make_folder, storage_error, write_new

DEFAULT_LEASE_S = 60.0
_BEATS_PER_LEASE = 5
_LONGEST_LEASE_S = 86_400.0
_COUNT_DIGITS = 12


@dataclass(frozen=True, kw_only=True)
class ClaimFile:
    """The bytes of a claim as read, and those facts in them that can be used; None where damaged."""

    content: bytes
    owner: str = "unknown"
    lease_s: float | None = None
    machine: str | None = None
    process: str | None = None


def count_text(count: int) -> bytes:
    """Return the beat count as it stands in the file."""
    return f"{count:0{_COUNT_DIGITS}d}".encode()


def encode_claim(key: str, owner: str, lease_s: float) -> bytes:
    """Return a new claim of this process; no two calls give the same bytes."""
    facts = {
        "kvbench_claim": 1,
        "key": key,
        "owner": owner,
        "lease_s": lease_s,
        "machine": machine(),
        "process": process(os.getpid()),
        "token": uuid.uuid4().hex,
    }
    return count_text(0) + b" " + json.dumps(facts).encode() + b"\n"


def read_claim(folder: Path, key: str, generation: int) -> ClaimFile | None:
    """Return the claim's file, None if it is gone; a damaged one is only its bytes."""
    try:
        content = (folder / f"{key[:16]}.{generation}").read_bytes()
    except OSError:
        return None
    return parse_claim(content)


def parse_claim(content: bytes) -> ClaimFile:
    """Return what `content` says; damaged or foreign bytes say nothing about their owner."""
    try:
        facts: Any = json.loads(content[_COUNT_DIGITS:])
        lease_s = float(facts["lease_s"])
        if not 0 < lease_s <= _LONGEST_LEASE_S:
            raise ValueError("no lease that could be waited for")
        texts = [str(facts[name]) for name in ("owner", "machine", "process")]
    except (ValueError, KeyError, TypeError):
        return ClaimFile(content=content)
    return ClaimFile(content=content, owner=texts[0], lease_s=lease_s, machine=texts[1], process=texts[2])


def generations(folder: Path, key: str) -> list[int]:
    """Return the generations of the cell's claims that exist, ascending; normally one or none."""
    suffixes = [path.suffix[1:] for path in folder.glob(f"{key[:16]}.*")]
    return sorted(int(suffix) for suffix in suffixes if suffix.isdecimal())


def owner_is_dead(found: ClaimFile) -> bool:
    """Whether the owner ran on this machine and is gone; False where that cannot be known."""
    if found.machine is None or found.process is None or found.machine != machine() or "?" in found.machine:
        return False
    number = found.process.partition("@")[0]
    return not number.isdecimal() or process(int(number)) != found.process


@cache
def machine() -> str:
    """Name this boot of this machine and the space of its process numbers; "?" parts are unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        space = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        boot = space = "?"
    return f"{socket.gethostname()} {boot} {space}"


def process(number: int) -> str:
    """Name the process `number` so that a later one with the same number differs; "NUMBER@gone" if dead."""
    try:
        text = Path(f"/proc/{number}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return f"{number}@gone"
    # The name in brackets may hold anything; state is the field after it, start time the 20th after it.
    fields = text.rpartition(")")[2].split()
    return f"{number}@gone" if fields[0] in ("Z", "X") else f"{number}@{fields[19]}"


class Claim:
    """A held lease on the cell `key`; others wait `lease_s` after its last beat."""

    def __init__(self, *, key: str, lease_s: float, path: Path, descriptor: int) -> None:
        self.key = key
        self.lease_s = lease_s
        self.path = path
        self._descriptor = descriptor
        self._count = 0
        self._released = False
        self._lock = threading.Lock()

    def beat(self) -> bool:
        """Show others that the owner lives; False if another one took the cell over."""
        with self._lock:
            if self._released or not self._is_mine():
                return False
            self._count += 1
            # The own file only, never the name: after a take-over the name is another owner's. A beat
            # that a sick disk refuses is made up by the next one.
            with contextlib.suppress(OSError):
                os.pwrite(self._descriptor, count_text(self._count), 0)
                os.fsync(self._descriptor)
            return True

    @contextlib.contextmanager
    def beating(self) -> Iterator[None]:
        """Beat from a thread while the block runs."""
        stop = threading.Event()

        def keep() -> None:
            while not stop.wait(self.lease_s / _BEATS_PER_LEASE) and self.beat():
                pass

        thread = threading.Thread(target=keep, name="claim", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def release(self) -> None:
        """Let the cell go; does nothing for a claim that was released or taken over."""
        with self._lock:
            if self._released:
                return
            self._released = True
            with contextlib.suppress(OSError):
                if self._is_mine():
                    self.path.unlink()
            with contextlib.suppress(OSError):
                os.close(self._descriptor)

    def _is_mine(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._descriptor), self.path.stat())
        except OSError:  # gone, or a network file system's "stale handle"
            return False


class Claims:
    """Takes leases under `results`/claims for `owner`, a text for people such as a job's number.

    steady_s: a clock that only goes forward; `time.monotonic` but for tests.
    """

    def __init__(
        self,
        results: Path,
        *,
        owner: str | None = None,
        lease_s: float = DEFAULT_LEASE_S,
        steady_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder = Path(results) / "claims"
        self.owner = owner or f"process {os.getpid()}"
        self.lease_s = lease_s
        self._steady_s = steady_s
        self._seen: dict[str, tuple[bytes, float]] = {}

    def take(self, key: str) -> Claim | None:
        """Return the lease on the cell `key`, None while another owner may be alive; ask again later.

        An owner on another machine counts as dead after its file did not change for `lease_s` between two
        calls of this object. Check the store again after a success: the former owner may have finished.
        Raises: ConfigError, RecordError for a folder that cannot be written to.
        """
        make_folder(self.folder)
        held = generations(self.folder, key)
        found = read_claim(self.folder, key, held[-1]) if held else None
        if found is not None and not self._is_over(key, found):
            return None
        if held and found is None:
            return None  # it went away just now; the next call sees what there is
        return self._win(key, held[-1] if held else 0, found)

    def _is_over(self, key: str, found: ClaimFile) -> bool:
        if owner_is_dead(found):
            return True
        content, since_s = self._seen.get(key, (None, 0.0))
        if content != found.content:
            self._seen[key] = (found.content, self._steady_s())
            return False
        # The lease that counts is the owner's if it can be read: it decides how often that one beats.
        return self._steady_s() - since_s >= (found.lease_s or self.lease_s)

    def _win(self, key: str, generation: int, over: ClaimFile | None) -> Claim | None:
        """Link a new file to the next generation; None if another one did, or the ground moved meanwhile."""
        path = self.folder / f"{key[:16]}.{generation + 1}"
        try:
            write_new(path, encode_claim(key, self.owner, self.lease_s))
            descriptor = os.open(path, os.O_RDWR)
        except FileExistsError:
            return None
        except OSError as error:
            raise storage_error(path, error) from error
        claim = Claim(key=key, lease_s=self.lease_s, path=path, descriptor=descriptor)
        # Nobody may have come and gone, or come later, between looking and linking.
        now = generations(self.folder, key)
        if now[-1:] != [generation + 1] or (over is not None and read_claim(self.folder, key, generation) != over):
            claim.release()
            return None
        for older in now[:-1]:
            with contextlib.suppress(OSError):
                (self.folder / f"{key[:16]}.{older}").unlink()
        self._seen.pop(key, None)
        return claim
