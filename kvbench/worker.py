"""What a spawned worker runs: read a job, build its cells from their configurations, run them.

A job is one JSON line on the standard input; nothing is pickled.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from kvbench.compose import Composed
from kvbench.config import build_cells
from kvbench.errors import ConfigError
from kvbench.quiet import quiet_libraries
from kvbench.results.store import PartialStore
from kvbench.runs.group_plan import GroupPlan
from kvbench.runs.worker import serve
from kvbench.runs.worker_pipe import protect, watcher_of


def main(job: dict[str, Any]) -> None:
    """Run the job and end the process without waiting for anything that a library left running."""
    protect(job["parent"])
    watcher = watcher_of(job)
    quiet_libraries()
    cells = build_cells([_composed(spec) for spec in job["cells"]])
    if [cell.key for cell in cells] != job["keys"]:
        raise ConfigError("the cells changed while the sweep ran (code, checkpoint or data); start it again")
    results = Path(job["results"])
    plan = GroupPlan(
        results=results,
        sweep=job["sweep"],
        share_prompts=job["share_prompts"],
        batches_of=lambda key: PartialStore(results, key),
    )
    serve(cells, plan, watcher)
    os._exit(0)


def _composed(spec: dict[str, Any]) -> Composed:
    return Composed(config=OmegaConf.create(spec["config"]), choices=spec["choices"])
