"""A8: what the numbers were measured on is written down, and agrees with the settings."""

from __future__ import annotations

from collections.abc import Iterator

from kvbench.audit.check import Check
from kvbench.audit.evidence import Cell, Peers

_NEEDED = ("python", "system", "machine", "device", "cpu_model", "num_threads", "torch", "transformers", "kvbench")
_NEEDED_ON_A_GPU = ("gpu", "gpu_memory_bytes", "cuda")
_MACHINE = ("system", "machine", "cpu_model", "gpu", "num_threads")


def _problems(cell: Cell, peers: Peers) -> Iterator[str]:
    found = cell.body["environment"]
    on_a_gpu = str(cell.setting("device")) == "cuda"
    missing = [name for name in (*_NEEDED, *(_NEEDED_ON_A_GPU if on_a_gpu else ())) if found.get(name) is None]
    if missing:
        yield f"the environment lacks {', '.join(missing)}"
    versions = cell.setting("versions")
    for name, version in versions.items() if isinstance(versions, dict) else ():
        if found.get(name) is not None and found[name] != version:
            yield f"the environment says {name} {found[name]}, the settings {version}"
    device = str(found.get("device") or "").split(":")[0]
    if device and cell.setting("device") not in (None, device):
        yield f"the environment says device {found['device']}, the settings {cell.setting('device')}"


def _notes(cell: Cell, peers: Peers) -> Iterator[str]:
    first = peers.usable[0]
    differs = [n for n in _MACHINE if cell.body["environment"].get(n) != first.body["environment"].get(n)]
    if differs and "tpot_ms" in cell.body["measurements"]:
        yield f"was timed where {', '.join(differs)} differ from those of {first.name}: compare no times between them"
    commit = cell.body["environment"].get("git_commit")
    if isinstance(commit, str) and commit.endswith("-dirty"):
        yield "was measured by code with changes that no commit holds"


ENVIRONMENT_CHECK = Check(
    id="A8",
    title="the environment is complete",
    meaning="nobody can tell what the numbers were measured on, or repeat them",
    applies=lambda cell, peers: cell.usable,
    problems=_problems,
    notes=_notes,
)
