"""How cells are spread over worker processes: the settings below `worker` in the configuration."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvbench.errors import ConfigError, close_matches
from kvbench.results.files import canonical_json
from kvbench.runs.supervisor import Ticket, WorkerPlan
from kvbench.runs.watchdog import Limits

_ISOLATIONS = ("group", "cell")


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """One worker per group of cells (`isolation=group`) or per cell (`isolation=cell`).

    timeout_s: time one cell may take in all, None for no limit. silence_s: time without any step, None
    for no limit. num_retries: fresh tries of a cell that was killed or ran out of memory. share_prompts:
    one prefill for all cells of a group; the quality numbers are the same without. group_cells: cells
    that one worker takes at most, so that several machines on one results folder share a sweep evenly.
    """

    isolation: str = "group"
    timeout_s: float | None = None
    silence_s: float | None = 900.0
    num_retries: int = 1
    share_prompts: bool = True
    group_cells: int | None = None

    def __post_init__(self) -> None:
        if self.isolation not in _ISOLATIONS:
            raise ConfigError(f"worker.isolation is {self.isolation!r}; {close_matches(self.isolation, _ISOLATIONS)}")
        for name in ("timeout_s", "silence_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"worker.{name} is {value}; it must be above 0 seconds, or null for no limit")
        if self.num_retries < 0:
            raise ConfigError(f"worker.num_retries is {self.num_retries}; it must be 0 or more")
        if self.group_cells is not None and self.group_cells < 1:
            raise ConfigError(f"worker.group_cells is {self.group_cells}; it must be at least 1, or null")

    def plan(self, tickets: Sequence[Ticket], *, results: Path, sweep: str) -> WorkerPlan:
        """Return what the supervisor needs to know to run `tickets`."""
        return WorkerPlan(
            results=results,
            sweep=sweep,
            share_prompts=self.share_prompts,
            limits=Limits(timeout_s=self.timeout_s, silence_s=self.silence_s),
            num_retries=self.num_retries,
            slots=slots_of(tickets),
        )

    def groups(self, tickets: Sequence[Ticket]) -> list[list[Ticket]]:
        """Return the tickets by what their cells share, no group larger than it may be, in their order."""
        found: dict[str, list[Ticket]] = {}
        for ticket in tickets:
            found.setdefault(canonical_json(ticket.cell.shared_settings), []).append(ticket)
        slots = max(1, len(slots_of(tickets)) // max(1, len(found)))
        most = 1 if self.isolation == "cell" else self.group_cells or len(tickets)
        groups = []
        for group in found.values():
            size = min(most, -(-len(group) // slots))  # every GPU gets some
            groups += [group[start : start + size] for start in range(0, len(group), size)]
        return groups

    def most_claims(self, tickets: Sequence[Ticket]) -> int | None:
        """Return how many cells to claim at once; None for all there are."""
        return None if self.group_cells is None else self.group_cells * len(slots_of(tickets))


def slots_of(tickets: Sequence[Ticket], environment: Mapping[str, str] = os.environ) -> list[dict[str, str]]:
    """Return the environment of each worker that may run at the same time: one per GPU with device=auto."""
    asked: Any = {str(ticket.spec["config"].get("device")) for ticket in tickets}
    if asked != {"auto"} or not all(ticket.cell.device.startswith("cuda") for ticket in tickets):
        return [{}]
    return gpu_slots(_num_gpus(), environment.get("CUDA_VISIBLE_DEVICES"))


def gpu_slots(num_gpus: int, visible: str | None) -> list[dict[str, str]]:
    """Return one slot per GPU; `visible` is what this process was given itself."""
    names = visible.split(",") if visible else [str(number) for number in range(num_gpus)]
    return [{"CUDA_VISIBLE_DEVICES": name} for name in names[:num_gpus]] if num_gpus > 1 else [{}]


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count()
