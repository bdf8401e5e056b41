"""How often the kernel killed a process of this control group for memory, to tell that from other kills."""

from __future__ import annotations

import re
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")
_WHOLE_MACHINE = Path("/proc/vmstat")
_COUNT = re.compile(r"^oom_kill (\d+)$", re.MULTILINE)


def num_oom_kills(
    *, cgroup: Path = _CGROUP, membership: Path = _MEMBERSHIP, whole_machine: Path = _WHOLE_MACHINE
) -> int | None:
    """Return the counter of the nearest group that has one (cgroup v2, then v1), else the machine's, else None."""
    for path in (*_counters(cgroup, membership), whole_machine):
        found = _COUNT.search(_text(path))
        if found is not None:
            return int(found[1])
    return None


def _counters(cgroup: Path, membership: Path) -> list[Path]:
    """Files to look at. In a container the path told may not exist; its own group is then the root."""
    paths = []
    for line in _text(membership).splitlines():
        _, _, rest = line.partition(":")
        controllers, _, own = rest.partition(":")
        if controllers == "":
            paths += [cgroup / own.strip("/") / "memory.events", cgroup / "memory.events"]
        elif "memory" in controllers.split(","):
            folder = cgroup / "memory"
            paths += [folder / own.strip("/") / "memory.oom_control", folder / "memory.oom_control"]
    return paths


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
