"""Save a W&B Report within a time limit, over the one that was saved from the same folder before.

The id of a saved report is kept sealed in <folder>; without that file a second report is made.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
from pathlib import Path

from kvbench.errors import KvbenchError, RecordError
from kvbench.results.files import replace_file, seal, unseal
from kvbench.sinks.wandb_report import Outline, save_report
from kvbench.sinks.wandb_service import quiet_setup, reason_of, within

SAVE_LIMIT_S = 60.0
_KIND, _VERSION = "kvbench_wandb_report", 1


def save_within(outline: Outline, folder: Path, *, project: str, entity: str | None) -> tuple[str, str]:
    """Return the URL of the saved report and "", or "" and why it was not saved; nothing is raised."""
    found: dict[str, str] = {}
    path = _path(folder, f"{quiet_setup()}\n{entity}\n{project}\n{outline.title}")

    def save() -> None:
        try:
            # The package prints the URL by itself.
            with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
                url, report_id = save_report(outline, project=project, entity=entity, report_id=_known(path))
            found["url"] = url
            _keep(path, report_id)
        # wandb raises many kinds: no network, refused key, unknown project.
        except Exception as error:
            found.setdefault("reason", reason_of(error))

    if not within(SAVE_LIMIT_S, save):
        return "", f"the server did not answer within {SAVE_LIMIT_S:g} s"
    return found.get("url", ""), found.get("reason", "")


def _path(folder: Path, target: str) -> Path:
    return folder / f".wandb-report-{hashlib.sha256(target.encode()).hexdigest()[:16]}.json"


def _known(path: Path) -> str:
    try:
        return str(unseal(path, _KIND, _VERSION, "Delete it.").get("id", ""))
    except RecordError:
        return ""


def _keep(path: Path, report_id: str) -> None:
    """Note the id; a disk that refuses costs a second report the next time."""
    with contextlib.suppress(OSError, KvbenchError):
        replace_file(path, seal(_KIND, _VERSION, {"id": report_id}))
