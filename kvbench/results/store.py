"""The results on disk: every attempt of every cell, and which attempt counts. This is the truth.

    results/cells/<key[:16]>/attempt-<uuid>.json       one immutable file per attempt
    results/cells/<key[:16]>/record.json               hard link to the accepted attempt
    results/cells/<key[:16]>/batches/<number>.json     one finished batch of a cell that is still being measured

A failed attempt is never put in the place of a measured one, whether or not it was asked for. Batches make a kill
cost one of them: only for numbers that are a function of the cell (quality), as timing and memory are never stitched
together from two processes. They go when the cell's ok record is committed.

Safe with many writers on one folder and with a kill at any instant: linking to a name that exists
fails, so of two processes that finish the same cell exactly one is accepted.

    store = RecordStore(Path("results"))
    if store.accepted(key) is None:
        store.commit(body)
    PartialStore(Path("results"), key).commit(3, {"nll_sum": [1.5, 2.5]})
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvbench.errors import RecordError
from kvbench.results.files import holding, link_new, link_over, seal, storage_error, sync, unseal, write_new
from kvbench.results.record import MEASURED, RECORD_FILE, cell_folder, check_body, counting, read_record, write_record
from kvbench.results.redaction import redacted_body

_KIND, _VERSION = "kvbench_batch", 1
_REMEDY = "It is measured again."
_NUM_TRIES = 3
_log = logging.getLogger(__name__)


class PartialStore:
    """The batches of the cell `key` under the results folder."""

    def __init__(self, results: Path, key: str) -> None:
        self.folder = cell_folder(Path(results), key) / "batches"
        self._key = key

    def batches(self) -> dict[int, dict[str, Any]]:
        """Return the payload of every whole batch by number; others are reported and left out."""
        bodies = [body for path in sorted(self.folder.glob("*.json")) if (body := self._whole(path)) is not None]
        return {body["number"]: body["payload"] for body in sorted(bodies, key=lambda body: int(body["number"]))}

    def commit(self, number: int, payload: Mapping[str, Any]) -> None:
        """Store the batch `number` durably; one that is there and whole stays as it is.

        Raises: RecordError (payload that JSON cannot hold, disk), ConfigError (folder).
        """
        path = self.folder / f"{number}.json"
        data = seal(_KIND, _VERSION, {"key": self._key, "number": number, "payload": dict(payload)})
        for _ in range(_NUM_TRIES):
            try:
                write_new(path, data)
                return
            except FileExistsError:
                if self._whole(path) is not None:
                    return
                with contextlib.suppress(OSError):
                    _set_aside(path)
            except RecordError as error:
                # Another process finished this very cell and removed the folder under our hands.
                if not isinstance(error.__cause__, FileNotFoundError):
                    raise
        raise RecordError(f"cannot write {path}: the folder keeps changing. Run again; finished cells are kept.")

    def remove(self) -> None:
        """Remove all batches: after the cell's record, or before it is measured afresh on request."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _whole(self, path: Path) -> dict[str, Any] | None:
        try:
            return self.read(path, self._key)
        except RecordError as error:
            _log.warning("%s", error)
            return None

    @staticmethod
    def read(path: Path, key: str | None) -> dict[str, Any]:
        """Return the envelope's body of one batch of the cell `key`, of any cell for None. Raises: RecordError."""
        body = unseal(path, _KIND, _VERSION, _REMEDY)
        if key is not None and body.get("key") != key:
            raise RecordError(f"{path} belongs to another cell. {_REMEDY}")
        number, payload = body.get("number"), body.get("payload")
        if not isinstance(number, int) or path.stem != str(number) or not isinstance(payload, dict):
            raise RecordError(f"{path} is no batch {path.stem}. {_REMEDY}")
        return body


def _set_aside(damaged: Path) -> None:
    """Rename what is in the place of a record or batch, which may be someone's file or folder, and keep it."""
    damaged.rename(damaged.with_name(f"damaged-{uuid.uuid4().hex}"))


class RecordStore:
    """All records under the results folder `folder`, which is created by the first commit."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._reported: set[Path] = set()

    def cell_folder(self, key: str) -> Path:
        """Return the folder that holds the attempts of the cell `key`."""
        return cell_folder(self.folder, key)

    def record_file(self, key: str) -> Path:
        """Return where the accepted record of `key` lies, if it has one."""
        return self.cell_folder(key) / RECORD_FILE

    def accepted(self, key: str) -> dict[str, Any] | None:
        """Return the record of `key` that counts if it verifies and did not fail; a damaged one is reported once."""
        accepted = self._read(self.record_file(key), key)
        if accepted is None:
            return None
        body = accepted if accepted["status"] in MEASURED else counting(accepted, self.attempts(key)).body
        return body if body["status"] in MEASURED else None

    def attempts(self, key: str) -> list[dict[str, Any]]:
        """Return all readable attempts of `key`, oldest first; a damaged one is reported once."""
        paths = sorted(self.cell_folder(key).glob("attempt-*.json"))
        bodies = [body for path in paths if (body := self._read(path, key)) is not None]
        return sorted(bodies, key=lambda body: str(body["started_utc"]))

    def commit(self, body: Mapping[str, Any], *, replace: bool = False) -> Path:
        """Store one attempt durably, without secrets, and return its file; it counts unless a measured one does.

        An accepted record that failed, or is damaged, gives way to any newer attempt; one that is ok or noisy
        only if `replace`, and to a measured one alone. When this returns, a crash of the machine no longer
        loses the attempt, and the batches of a measured cell are gone.
        Raises: RecordError (wrong body, disk), ConfigError (folder), FileExistsError (attempt id reused).
        """
        check_body(body)
        folder = self.cell_folder(body["key"])
        attempt = folder / f"attempt-{body['attempt']}.json"
        write_record(attempt, redacted_body(body))
        try:
            self._accept(attempt, body, replace)
            sync(folder)
        except OSError as error:
            raise storage_error(folder / RECORD_FILE, error) from error
        if body["status"] in MEASURED:
            PartialStore(self.folder, body["key"]).remove()
        return attempt

    def _accept(self, attempt: Path, body: Mapping[str, Any], replace: bool) -> None:
        accepted = attempt.with_name(RECORD_FILE)
        # "Is it measured?" and "replace it" are one step among processes. Without locks only a replacement can be lost
        # to a simultaneous one; the first acceptance needs none.
        with holding(os.open(attempt.parent, os.O_RDONLY)):
            try:
                link_new(attempt, accepted)
            except FileExistsError:
                current = self._read(accepted, body["key"])
                if current is None:
                    with contextlib.suppress(FileNotFoundError):
                        _set_aside(accepted)
                elif current["status"] in MEASURED and not (replace and body["status"] in MEASURED):
                    return
                elif current["status"] not in MEASURED:
                    # The newest measured one, should an earlier kvbench have let a failure take its place.
                    counts = counting(dict(body), self.attempts(body["key"])).body
                    measured = attempt.with_name(f"attempt-{counts['attempt']}.json")
                    attempt = measured if measured.is_file() else attempt
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
