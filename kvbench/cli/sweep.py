"""From composed cells to a sweep, and one cell as a job of another launcher (joblib, submitit).

Whoever launches, a cell goes through the same store, claims, workers and records.

Keep notices about optional packages out of the progress bars; errors still show.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig

from kvbench.config.compose import Composed

if TYPE_CHECKING:
    from kvbench.sweep.sweep import Sweep


def quiet_libraries() -> None:
    """Set what libraries read when they are imported; what the user has set stays.

    tqdm's monitor is a thread that wakes up to redraw bars, also beside what is timed.
    """
    from tqdm import tqdm  # here: `kvbench --help` waits for no library

    tqdm.monitor_interval = 0
    logging.getLogger("hydra").setLevel(logging.CRITICAL)  # a class that is not found is told in one line
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


SUPERVISED = "supervised"


def run_job(config: Any) -> str:
    """Run the cell that Hydra composed, in a supervised worker, and return its status.

    A job that is told to stop ends its process without an answer, so that a scheduler starts it again.
    """
    quiet_libraries()
    runtime = HydraConfig.get().runtime
    make_importable([source.path for source in runtime.config_sources if source.schema == "file" and source.path])
    from kvbench.sweep.sweep import StopRequest

    with StopRequest().watching() as stop:
        sweep = open_sweep([Composed(config=config, choices=dict(runtime.choices))])
        sweep.run(stop)
        if stop.number is not None:
            os._exit(stop.exit_code)
    (status,) = sweep.statuses.values()
    return status


def open_sweep(grid: Sequence[Composed]) -> Sweep:
    """Return the sweep over `grid`, everything checked and finished cells taken. Raises: ConfigError, DataError."""
    from kvbench.config.build import build, build_cells, build_sinks, check_shared, is_forced, results_folder
    from kvbench.results.claims import Claims
    from kvbench.sweep.supervisor import Ticket, WorkerSettings
    from kvbench.sweep.sweep import Sweep

    check_shared(grid)
    cells = build_cells(grid)
    tickets = [Ticket(cell=cell, spec=composed.as_spec()) for cell, composed in zip(cells, grid, strict=True)]
    config = grid[0].config
    sweep = Sweep(
        name=str(config.sweep),
        results=results_folder(config),
        tickets={ticket.cell.key: ticket for ticket in tickets},
        workers=build(config.worker, "worker", is_a=WorkerSettings),
        sinks=build_sinks(config),
        claims=Claims(results_folder(config), owner=_owner()),
        force=is_forced(config),
    )
    sweep.open()
    return sweep


def _owner() -> str:
    """Return who claims cells, for people: machine, process, and the scheduler's job if there is one."""
    job = os.environ.get("SLURM_JOB_ID")
    return f"{socket.gethostname()} process {os.getpid()}" + (f" job {job}" if job else "")


def make_importable(config_folders: Sequence[str]) -> None:
    """Let `_target_: mine.Mine` be found beside the user's configs or in the working folder.

    They go last on the path, so that no file of theirs can shadow a library.
    """
    for folder in config_folders:
        paths = (str(Path.cwd()), str(Path(folder).parent))
        sys.path += [path for path in paths if path not in sys.path]
