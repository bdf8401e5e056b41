"""Whether a report still says what the records say, without reading them.

A stamp beside the report holds a hash over the files it was built from (name, size, time, inode) and
the version that built it; records are immutable and only ever replaced, so an equal hash means equal bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

from kvbench.installed import installed_version
from kvbench.results.files import replace_file
from kvbench.results.record import AUTOPSY_FILE

STAMP = ".built-from"
_MADE = ("report/index.html", "report/table.md", "table.csv", "table.parquet", "samples.csv", "samples.parquet")


def is_current(results_folder: Path) -> bool:
    """Return whether every file of the report is there and was built from the records that are there now."""
    try:
        stamp = (results_folder / "report" / STAMP).read_text(encoding="ascii")
    except (OSError, ValueError):
        return False
    return stamp == inputs_digest(results_folder) and all((results_folder / name).is_file() for name in _MADE)


def write_stamp(results_folder: Path, digest: str) -> None:
    """Say that the report was built from what `digest` describes. Raises: ConfigError, RecordError."""
    replace_file(results_folder / "report" / STAMP, digest.encode())


def inputs_digest(results_folder: Path) -> str:
    """Return the hash of what a report would be built from now; take it before building."""
    digest = hashlib.sha256(installed_version().encode())
    cells, frontiers = results_folder / "cells", results_folder / "frontier"
    patterns = ("*/record.json", "*/attempt-*.json", f"*/{AUTOPSY_FILE}")
    for path in sorted([*(path for pattern in patterns for path in cells.glob(pattern)), *frontiers.glob("*.json")]):
        with contextlib.suppress(FileNotFoundError):  # another job has set it aside since
            stat = path.stat()
            digest.update(f"{path.parent.name} {path.name} {stat.st_size} {stat.st_mtime_ns} {stat.st_ino}\n".encode())
    return digest.hexdigest()
