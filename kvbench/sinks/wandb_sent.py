"""What was sent to W&B already: one small sealed file per run, content and destination.

    <folder>/wandb/sent/<run id>-<digest>.json

A file is written once and never changed, so any number of processes may note what they sent. Losing
these files costs a second upload, which lands on the same runs.
"""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

from kvbench.errors import KvbenchError, RecordError
from kvbench.results.files import seal, unseal, write_new

_KIND, _VERSION = "kvbench_wandb_sent", 1


def is_sent(folder: Path, target: str, run_id: str, digest: str) -> bool:
    """Tell whether content of `digest` was sent as `run_id` to `target`; a damaged file counts as not sent."""
    try:
        body = unseal(_path(folder, target, run_id, digest), _KIND, _VERSION, "Delete it; the run is sent again.")
    except RecordError:
        return False
    return body == _body(target, run_id, digest)


def note_sent(folder: Path, target: str, run_id: str, digest: str) -> None:
    """Keep that content of `digest` was sent as `run_id` to `target`; a disk that refuses costs a second upload."""
    path, data = _path(folder, target, run_id, digest), seal(_KIND, _VERSION, _body(target, run_id, digest))
    with contextlib.suppress(OSError):
        if path.exists() and path.read_bytes() != data:
            path.unlink()
    with contextlib.suppress(OSError, KvbenchError):
        write_new(path, data)


def _path(folder: Path, target: str, run_id: str, digest: str) -> Path:
    name = hashlib.sha256(f"{target}\n{digest}".encode()).hexdigest()[:16]
    return folder / "wandb" / "sent" / f"{run_id}-{name}.json"


def _body(target: str, run_id: str, digest: str) -> dict[str, str]:
    # A server's URL may hold a password.
    return {"target": hashlib.sha256(target.encode()).hexdigest(), "run": run_id, "digest": digest}
