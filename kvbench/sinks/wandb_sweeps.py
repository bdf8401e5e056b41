"""Which cells a sweep had when its summary was sent: those it measured and those it found measured before.

    <folder>/wandb/sweeps/<id of the summary run>.json

A record names the sweep that measured it, and no later one that used it. Losing these files costs the latter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection
from pathlib import Path

from kvbench.errors import KvbenchError, RecordError
from kvbench.results.files import replace_file, seal, unseal

_KIND, _VERSION = "kvbench_wandb_sweep", 1


def note_sweep(folder: Path, run_id: str, sweep: str, keys: Collection[str]) -> None:
    """Keep which cells the summary `run_id` of `sweep` shows; a disk that refuses costs the note."""
    with contextlib.suppress(OSError, KvbenchError):
        replace_file(_place(folder) / f"{run_id}.json", seal(_KIND, _VERSION, {"sweep": sweep, "keys": sorted(keys)}))


def cells_of_sweep(folder: Path, sweep: str, measured: Collection[str], is_there: Callable[[str], bool]) -> list[str]:
    """Return the keys of the largest noted sweep of that name that has all of `measured` and whose cells are all there.

    Without such a note, `measured` themselves.
    """
    best = sorted(measured)
    for path in sorted(_place(folder).glob("*.json")):
        with contextlib.suppress(RecordError):
            body = unseal(path, _KIND, _VERSION, "Delete it.")
            if body["sweep"] == sweep and set(measured) <= set(body["keys"]) and all(map(is_there, body["keys"])):
                best = max(best, body["keys"], key=len)
    return best


def _place(folder: Path) -> Path:
    return folder / "wandb" / "sweeps"
