"""What is in a claim's file, and what it tells about its owner.

Text of one line: a beat count of fixed width, which the owner overwrites in place, then JSON that never
changes. Whoever looks compares the bytes; the JSON says, for an owner on this machine, whether it died.
"""

from __future__ import annotations

import json
import os
import socket
import uuid
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

COUNT_AT = 0
_COUNT_DIGITS = 12
_LONGEST_LEASE_S = 86_400.0


@dataclass(frozen=True, kw_only=True)
class ClaimFile:
    """The bytes of a claim as read, and those facts in them that can be used; None where damaged."""

    content: bytes
    owner: str = "unknown"
    lease_s: float | None = None
    machine: str | None = None
    process: str | None = None


def count_text(count: int) -> bytes:
    """Return the beat count as it stands in the file."""
    return f"{count:0{_COUNT_DIGITS}d}".encode()


def encode_claim(key: str, owner: str, lease_s: float) -> bytes:
    """Return a new claim of this process; no two calls give the same bytes."""
    facts = {
        "kvbench_claim": 1,
        "key": key,
        "owner": owner,
        "lease_s": lease_s,
        "machine": machine(),
        "process": process(os.getpid()),
        "token": uuid.uuid4().hex,
    }
    return count_text(0) + b" " + json.dumps(facts).encode() + b"\n"


def read_claim(folder: Path, key: str, generation: int) -> ClaimFile | None:
    """Return the claim's file, None if it is gone; a damaged one is only its bytes."""
    try:
        content = (folder / f"{key[:16]}.{generation}").read_bytes()
    except OSError:
        return None
    return parse_claim(content)


def parse_claim(content: bytes) -> ClaimFile:
    """Return what `content` says; damaged or foreign bytes say nothing about their owner."""
    try:
        facts: Any = json.loads(content[_COUNT_DIGITS:])
        lease_s = float(facts["lease_s"])
        if not 0 < lease_s <= _LONGEST_LEASE_S:
            raise ValueError("no lease that could be waited for")
        texts = [str(facts[name]) for name in ("owner", "machine", "process")]
    except (ValueError, KeyError, TypeError):
        return ClaimFile(content=content)
    return ClaimFile(content=content, owner=texts[0], lease_s=lease_s, machine=texts[1], process=texts[2])


def generations(folder: Path, key: str) -> list[int]:
    """Return the generations of the cell's claims that exist, ascending; normally one or none."""
    suffixes = [path.suffix[1:] for path in folder.glob(f"{key[:16]}.*")]
    return sorted(int(suffix) for suffix in suffixes if suffix.isdecimal())


def owner_is_dead(found: ClaimFile) -> bool:
    """Whether the owner ran on this machine and is gone; False where that cannot be known."""
    if found.machine is None or found.process is None or found.machine != machine() or "?" in found.machine:
        return False
    number = found.process.partition("@")[0]
    return not number.isdecimal() or process(int(number)) != found.process


@cache
def machine() -> str:
    """Name this boot of this machine and the space of its process numbers; "?" parts are unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        space = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        boot = space = "?"
    return f"{socket.gethostname()} {boot} {space}"


def process(number: int) -> str:
    """Name the process `number` so that a later one with the same number differs; "NUMBER@gone" if dead."""
    try:
        text = Path(f"/proc/{number}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return f"{number}@gone"
    # The name in brackets may hold anything; state is the field after it, start time the 20th after it.
    fields = text.rpartition(")")[2].split()
    return f"{number}@gone" if fields[0] in ("Z", "X") else f"{number}@{fields[19]}"
