"""The finished batches of a cell that is still being measured, so that a kill costs one batch.

    results/cells/<key[:16]>/batches/<number>.json     the payload of one planned batch

Only for numbers that are a function of the cell (quality); timing and memory are never stitched
together from two processes. The files go when the cell's ok record is committed.

    parts = PartialStore(Path("results"), key)
    done = parts.batches()
    parts.commit(3, {"nll_sum": [1.5, 2.5]})
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvbench.durable import write_new
from kvbench.errors import RecordError
from kvbench.sealed import seal, unseal

_KIND, _VERSION = "kvbench_batch", 1
_REMEDY = "It is measured again."
_NUM_TRIES = 3
_log = logging.getLogger(__name__)


class PartialStore:
    """The batches of the cell `key` under the results folder."""

    def __init__(self, results: Path, key: str) -> None:
        self.folder = Path(results) / "cells" / key[:16] / "batches"
        self._key = key

    def batches(self) -> dict[int, dict[str, Any]]:
        """Return the payload of every whole batch by number; others are reported and left out."""
        found: dict[int, dict[str, Any]] = {}
        for path in sorted(self.folder.glob("*.json")):
            try:
                body = self.read(path, self._key)
            except RecordError as error:
                _log.warning("%s", error)
            else:
                found[body["number"]] = body["payload"]
        return dict(sorted(found.items()))

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
                if self._is_whole(path):
                    return
                _set_aside(path)
            except RecordError as error:
                # Another process finished this very cell and removed the folder under our hands.
                if not isinstance(error.__cause__, FileNotFoundError):
                    raise
        raise RecordError(f"cannot write {path}: the folder keeps changing. Run again; finished cells are kept.")

    def remove(self) -> None:
        """Remove all batches: after the cell's record, or before it is measured afresh on request."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _is_whole(self, path: Path) -> bool:
        try:
            self.read(path, self._key)
        except RecordError as error:
            _log.warning("%s", error)
            return False
        return True

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


def _set_aside(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.rename(path.with_name(f"damaged-{uuid.uuid4().hex}"))
