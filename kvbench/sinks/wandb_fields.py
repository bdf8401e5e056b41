"""What a W&B run shows of a record, and whether a key is there; nothing here imports wandb."""

from __future__ import annotations

import netrc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

_LATENCY_PREFIXES = ("ttft_", "tpot_", "throughput_", "policy_ms")
_MEMORY_PREFIXES = ("entries_", "realised_budget_")


def summary_numbers(body: dict[str, Any]) -> dict[str, float]:
    """Return the measurements as flat summary keys: quality/ppl, quality/ppl_low, latency/tpot_ms, ..."""
    return dict(_numbers(body["measurements"]))


def _numbers(measurements: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for name, entry in measurements.items():
        for suffix, part in (("", "value"), ("_low", "low"), ("_high", "high")):
            if entry.get(part) is not None:
                yield f"{_group(name)}/{name}{suffix}", entry[part]


def _group(name: str) -> str:
    if name.endswith("_bytes") or name.startswith(_MEMORY_PREFIXES):
        return "memory"
    return "latency" if name.startswith(_LATENCY_PREFIXES) else "quality"


def run_tags(body: dict[str, Any]) -> list[str]:
    """Return model, dataset, policy and status, by which runs are filtered."""
    names = [body["labels"].get(label) for label in ("model", "dataset", "policy")]
    # wandb refuses empty tags and tags over 64 letters.
    return sorted({str(name)[:64] for name in [*names, body["status"]] if name})


def has_api_key(server: str) -> bool:
    """Tell, without the network, whether wandb would find a key for `server` (a URL)."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    hosts = {urlsplit(server).netloc, "api.wandb.ai"}
    files = [os.environ["NETRC"]] if "NETRC" in os.environ else ["~/.netrc", "~/_netrc"]
    return any(hosts & _netrc_hosts(Path(name).expanduser()) for name in files)


def _netrc_hosts(path: Path) -> set[str]:
    try:
        return set(netrc.netrc(str(path)).hosts)
    except (OSError, netrc.NetrcParseError):
        return set()
