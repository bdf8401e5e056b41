"""The results on disk: every attempt of every cell, and which attempt counts. This is the truth.

    results/cells/<key[:16]>/attempt-<uuid>.json    one immutable file per attempt
    results/cells/<key[:16]>/record.json            hard link to the accepted attempt

Safe with many writers on one folder and with a kill at any instant: linking to a name that exists
fails, so of two processes that finish the same cell exactly one is accepted.

    store = RecordStore(Path("results"))
    if store.accepted(key) is None:
        store.commit(body)
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kvbench.durable import link_new, link_over, storage_error, sync_folder
from kvbench.errors import RecordError
from kvbench.records import MEASURED, check_body, read_record, write_record
from kvbench.redaction import redacted_body
from kvbench.sinks.partial import PartialStore

_log = logging.getLogger(__name__)


class RecordStore:
    """All records under the results folder `folder`, which is created by the first commit."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._reported: set[Path] = set()

    def cell_folder(self, key: str) -> Path:
        """Return the folder that holds the attempts of the cell `key`."""
        return self.folder / "cells" / key[:16]

    def record_file(self, key: str) -> Path:
        """Return where the accepted record of `key` lies, if it has one."""
        return self.cell_folder(key) / "record.json"

    def accepted(self, key: str) -> dict[str, Any] | None:
        """Return the accepted record of `key` if it verifies and did not fail; a damaged one is reported once."""
        body = self._read(self.record_file(key), key)
        return body if body is not None and body["status"] in MEASURED else None

    def attempts(self, key: str) -> list[dict[str, Any]]:
        """Return all readable attempts of `key`, oldest first; a damaged one is reported once."""
        paths = sorted(self.cell_folder(key).glob("attempt-*.json"))
        bodies = [body for path in paths if (body := self._read(path, key)) is not None]
        return sorted(bodies, key=lambda body: str(body["started_utc"]))

    def commit(self, body: Mapping[str, Any], *, replace: bool = False) -> Path:
        """Store one attempt durably, without secrets, and return its file; it counts unless a measured one does.

        An accepted record that failed, or is damaged, gives way to any newer attempt; one that is ok or noisy
        only if `replace`. When this returns, a crash of the machine no longer loses the attempt, and the batches
        of a measured cell are gone.
        Raises: RecordError (wrong body, disk), ConfigError (folder), FileExistsError (attempt id reused).
        """
        check_body(body)
        folder = self.cell_folder(body["key"])
        attempt = folder / f"attempt-{body['attempt']}.json"
        write_record(attempt, redacted_body(body))
        try:
            self._accept(attempt, body["key"], replace)
            sync_folder(folder)
        except OSError as error:
            raise storage_error(folder / "record.json", error) from error
        if body["status"] in MEASURED:
            PartialStore(self.folder, body["key"]).remove()
        return attempt

    def _accept(self, attempt: Path, key: str, replace: bool) -> None:
        accepted = attempt.with_name("record.json")
        with _locked(attempt.parent):
            try:
                link_new(attempt, accepted)
            except FileExistsError:
                current = self._read(accepted, key)
                if current is None:
                    _set_aside(accepted)
                if current is None or current["status"] not in MEASURED or replace:
                    link_over(attempt, accepted)

    def _read(self, path: Path, key: str) -> dict[str, Any] | None:
        if not os.path.lexists(path):
            return None
        try:
            body = read_record(path)
            if body["key"] != key:
                raise RecordError(f"{path} belongs to another cell ({body['key']}). Move it out of the results folder.")
        except RecordError as error:
            if path not in self._reported:
                self._reported.add(path)
                _log.warning("%s Until then it counts as missing.", error)
            return None
        return body


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, so that "is it measured?" and "replace it" are one step among processes."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        # Some network file systems have no such lock. There only a replacement can be lost to a
        # simultaneous one; the first acceptance needs no lock.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _set_aside(damaged: Path) -> None:
    """Rename what is in the place of a record, which may be someone's file or folder, and keep it."""
    with contextlib.suppress(FileNotFoundError):
        damaged.rename(damaged.with_name(f"damaged-{uuid.uuid4().hex}"))
