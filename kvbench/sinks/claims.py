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
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from kvbench.durable import TEMPORARY, link_new, make_folder, storage_error, write_synced
from kvbench.sinks.claim_file import (
    COUNT_AT,
    ClaimFile,
    count_text,
    encode_claim,
    generations,
    owner_is_dead,
    read_claim,
)

DEFAULT_LEASE_S = 60.0
_BEATS_PER_LEASE = 5


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
                os.pwrite(self._descriptor, count_text(self._count), COUNT_AT)
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
        temporary = self.folder / f".{path.name}.{uuid.uuid4().hex}{TEMPORARY}"
        try:
            write_synced(temporary, encode_claim(key, self.owner, self.lease_s))
            link_new(temporary, path)
            descriptor = os.open(path, os.O_RDWR)
        except FileExistsError:
            return None
        except OSError as error:
            raise storage_error(path, error) from error
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()
        claim = Claim(key=key, lease_s=self.lease_s, path=path, descriptor=descriptor)
        if not self._is_next(key, generation, over):
            claim.release()
            return None
        self._remove_older(key, generation)
        self._seen.pop(key, None)
        return claim

    def _is_next(self, key: str, generation: int, over: ClaimFile | None) -> bool:
        """Whether nobody came and went, or came later, between looking and linking."""
        now = generations(self.folder, key)
        if not now or now[-1] != generation + 1:
            return False
        return over is None or read_claim(self.folder, key, generation) == over

    def _remove_older(self, key: str, generation: int) -> None:
        for older in generations(self.folder, key):
            if older <= generation:
                with contextlib.suppress(OSError):
                    (self.folder / f"{key[:16]}.{older}").unlink()
