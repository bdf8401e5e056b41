"""What a W&B run shows of a record, and whether a key is there; nothing here imports wandb."""

from __future__ import annotations

import netrc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from kvbench.measures import MEASURES

_LATENCY_UNITS = ("ms", "tokens/s", "bytes/s", "prompts")
_LATENCY_ENDINGS = ("_ratio_to_full", "roof_share_fraction")
_MEMORY_UNITS = ("bytes", "entries")
_MEMORY_ENDINGS = ("realised_budget_fraction", "peak_over_bound_ratio")
_NAMED = ("model", "dataset", "policy")


def summary_numbers(body: dict[str, Any]) -> dict[str, float]:
    """Return the measurements as flat summary keys: quality/ppl, quality/ppl_low, latency/tpot_ms, ..."""
    return dict(_numbers(body["measurements"]))


def _numbers(measurements: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for name, entry in measurements.items():
        for suffix, part in (("", "value"), ("_low", "low"), ("_high", "high")):
            if entry.get(part) is not None:
                yield f"{measure_group(name)}/{name}{suffix}", entry[part]


def measure_group(name: str) -> str:
    """Return the first part of a measurement's key: quality, latency or memory."""
    unit = MEASURES[name].unit if name in MEASURES else ""
    if unit in _LATENCY_UNITS or name.endswith(_LATENCY_ENDINGS):
        return "latency"
    if name == "num_skipped_items":
        return "quality"
    return "memory" if unit in _MEMORY_UNITS or name.endswith(_MEMORY_ENDINGS) else "quality"


def run_config(body: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a cell as nested groups, each with its name: config.policy.name can be grouped by."""
    cell, labels = body["cell"], body["labels"]
    named = {part: {"name": labels[part], **_settings(cell.get(part))} for part in _NAMED}
    budget = {
        "name": labels["budget"],
        "fraction": labels.get("budget_fraction"),
        "tokens": labels.get("budget_tokens"),
    }
    nested = {**named, "budget": {**_settings(cell.get("budget")), **budget}, "positions": labels.get("positions")}
    return {**cell, **nested, "key": body["key"], "sweep": body["sweep"], "environment": body["environment"]}


def _settings(part: Any) -> dict[str, Any]:
    return part if isinstance(part, dict) else {}


def run_tags(body: dict[str, Any]) -> list[str]:
    """Return model, dataset, policy and status, by which runs are filtered."""
    names = [body["labels"].get(label) for label in _NAMED]
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
