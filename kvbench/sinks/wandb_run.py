"""One W&B run, whatever it shows: started, filled and ended within a time limit.

write_run(RunSpec(id=key[:16], ...), place, "offline")
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kvbench.results.files import make_folder
from kvbench.sinks.wandb_sent import is_sent, note_sent
from kvbench.sinks.wandb_service import own_folders, quiet_setup, run_settings

if TYPE_CHECKING:
    import wandb

Online = Literal["online", "offline"]


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """What one run is called and holds; `fill` logs into the started run.

    `digest` changes when what the run would show does, so that the same is not sent twice.
    """

    id: str
    digest: str
    name: str
    group: str
    job_type: Literal["cell", "summary"]
    tags: Sequence[str]
    config: dict[str, Any]
    fill: Callable[[wandb.Run], None]
    exit_code: int = 0


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where runs go: a project on a server, and `folder`/wandb, where wandb keeps its files."""

    project: str
    entity: str | None
    folder: Path
    timeout_s: float

    def target(self, mode: Online) -> str:
        """Return what tells this destination from others below the same folder."""
        server = quiet_setup() if mode == "online" else ""
        return "\n".join((mode, server, self.entity or "", self.project))

    def has(self, run_id: str, digest: str, mode: Online) -> bool:
        """Tell whether this very content was sent before; of offline runs, whether it is still here."""
        sent = is_sent(self.folder, self.target(mode), run_id, digest)
        return sent and (mode == "online" or any((self.folder / "wandb").glob(f"offline-run-*-{run_id}/*.wandb")))


def write_run(spec: RunSpec, place: Place, mode: Online) -> None:
    """Send one run and note that it was sent. Raises: whatever wandb does, after `place.timeout_s` at most."""
    make_folder(place.folder)  # wandb would quietly write to /tmp instead
    with own_folders(place.folder):
        run = _start(spec, place, mode)
        try:
            spec.fill(run)
        finally:
            run.finish(exit_code=spec.exit_code)
    note_sent(place.folder, place.target(mode), spec.id, spec.digest)


def _start(spec: RunSpec, place: Place, mode: Online) -> wandb.Run:
    quiet_setup()
    import wandb

    return wandb.init(
        id=spec.id,
        project=place.project,
        entity=place.entity,
        group=spec.group,
        name=spec.name,
        job_type=spec.job_type,
        tags=spec.tags,
        config=spec.config,
        dir=str(place.folder.resolve()),  # wandb writes from a process of its own, which may stand elsewhere
        mode=mode,
        reinit="finish_previous",
        settings=run_settings(place.timeout_s),
    )
