"""Weights & Biases as a mirror: one run per cell, online if it can be, else kept in a folder.

The run id comes from the cell key, so a cell that is measured or uploaded again lands on the same
run. Nothing here can stop or hang a sweep: starting and finishing an online run have a time limit,
and after the first failure the rest of the sweep is kept offline, with one line that says how to upload.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kvbench.durable import make_folder
from kvbench.errors import ConfigError, close_matches
from kvbench.sinks.console import say
from kvbench.sinks.wandb_fields import has_api_key, run_tags, summary_numbers
from kvbench.sinks.wandb_service import check_online, quiet_setup, restart_service, run_settings

if TYPE_CHECKING:
    import wandb

Mode = Literal["online", "offline", "disabled"]
_MODES = ("auto", "online", "offline", "disabled")
_LONGEST_TIMEOUT_S = 30.0
_RESTART_S = 5.0  # nothing is worth waiting for: the run is written again
_log = logging.getLogger(__name__)


@dataclass
class _Sweep:
    """What changes while a sweep runs; the sink itself stays frozen."""

    name: str = ""
    mode: Mode = "disabled"
    reason: str = ""
    num_offline: int = 0
    started: bool = False

    def restart(self, name: str, mode: Mode, reason: str) -> None:
        self.name, self.mode, self.reason, self.num_offline, self.started = name, mode, reason, 0, False


@dataclass(frozen=True, kw_only=True)
class WandbSink:
    """Sends each finished cell to one run of `project`.

    mode: "auto" is "online" if an API key is found, else "offline"; "disabled" does nothing.
    folder: the results folder; the runs' files go to its subfolder wandb/.
    timeout_s: limit for the start, and again for the end, of an online run.
    """

    project: str
    mode: str = "auto"
    folder: Path = Path("results")
    entity: str | None = None
    timeout_s: float = 10.0
    _sweep: _Sweep = field(default_factory=_Sweep, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.mode not in _MODES:
            raise ConfigError(f"sink.wandb.mode is {self.mode!r}; {close_matches(self.mode, _MODES)}")
        if not 0 < self.timeout_s <= _LONGEST_TIMEOUT_S:
            raise ConfigError(f"sink.wandb.timeout_s is {self.timeout_s}; it must lie in (0, {_LONGEST_TIMEOUT_S:g}]")
        if self.mode == "online":
            check_online()
        object.__setattr__(self, "folder", Path(self.folder))  # yaml gives text

    def open(self, sweep: str, num_cells: int) -> None:
        """Decide the mode for `sweep`; a missing wandb package is one warning line."""
        self._sweep.restart(sweep, "disabled", "")
        if self.mode != "disabled" and importlib.util.find_spec("wandb") is None:
            _log.warning("wandb is not installed, so nothing is sent to it. Install it with: pip install wandb")
            return
        self._sweep.restart(sweep, *self._resolve_mode())

    def record(self, body: dict[str, Any]) -> None:
        """Send one cell; a failing online run is repeated offline, and so are all later ones."""
        if self._sweep.mode == "online":
            try:
                self._write_run(body, "online")
                return
            # wandb raises many kinds: no network, refused key, deleted run, time limit.
            except Exception as error:
                reason = " ".join(str(error).split())[:160]
                self._sweep.mode, self._sweep.reason = "offline", f"the online run failed: {reason}"
                restart_service(min(self.timeout_s, _RESTART_S))
        if self._sweep.mode == "offline":
            self._write_offline(body)
            self._sweep.num_offline += 1

    def close(self) -> None:
        """Print, if runs were kept offline, the one line that says why, where and how to upload them."""
        num_runs, self._sweep.num_offline = self._sweep.num_offline, 0
        if self._sweep.started:
            # Every run is finished; what is left of wandb would else be waited for when the process ends.
            restart_service(min(self.timeout_s, _RESTART_S))
        if num_runs:
            folder = (self.folder / "wandb").resolve()
            command = f"wandb sync {shlex.quote(str(folder))}/offline-run-*"
            say(f"wandb: {num_runs} runs kept offline ({self._sweep.reason}) in {folder}; upload them with: {command}")

    def _write_offline(self, body: dict[str, Any]) -> None:
        """Write the run; if wandb's own process was killed, once more with a new one."""
        try:
            self._write_run(body, "offline")
        except Exception:
            restart_service(min(self.timeout_s, _RESTART_S))
            self._write_run(body, "offline")

    def _resolve_mode(self) -> tuple[Mode, str]:
        asked = os.environ.get("WANDB_MODE", "")
        wanted = asked if self.mode == "auto" and asked in _MODES else self.mode
        if wanted == "disabled":
            return "disabled", ""
        if wanted == "offline":
            return "offline", "as asked"
        # Without this check wandb would stop and ask for a key at a terminal.
        return ("online", "") if has_api_key(quiet_setup()) else ("offline", "no API key; see wandb login")

    def _write_run(self, body: dict[str, Any], mode: Mode) -> None:
        run = self._start_run(body, mode)
        try:
            _log_entries(run, body["curves"].get("entries", []))
            _log_samples(run, body["samples"])
            run.summary.update({"status": body["status"], "duration_s": body["duration_s"], **summary_numbers(body)})
        finally:
            run.finish(exit_code=0 if body["status"] == "ok" else 1)

    def _start_run(self, body: dict[str, Any], mode: Mode) -> wandb.Run:
        quiet_setup()
        import wandb

        labels, self._sweep.started = body["labels"], True
        make_folder(self.folder)  # wandb would quietly write to /tmp instead
        return wandb.init(
            id=body["key"][:16],
            project=self.project,
            entity=self.entity,
            group=self._sweep.name or body["sweep"],
            name=f"{labels['policy']}@{labels['budget']}",
            job_type="cell",
            tags=run_tags(body),
            config={**{name: body[name] for name in ("key", "labels", "environment")}, **body["cell"]},
            dir=str(self.folder.resolve()),  # wandb writes from a process of its own, which may stand elsewhere
            mode=mode,
            reinit="finish_previous",
            settings=run_settings(self.timeout_s),
        )


def _log_entries(run: wandb.Run, entries: list[list[float]]) -> None:
    run.define_metric("seen_tokens", hidden=True)
    run.define_metric("entries/*", step_metric="seen_tokens")
    for seen, mean, most in entries:
        run.log({"seen_tokens": seen, "entries/mean": mean, "entries/max": most})


def _log_samples(run: wandb.Run, samples: list[dict[str, Any]]) -> None:
    import wandb

    if not samples:
        return
    columns = list(dict.fromkeys(name for sample in samples for name in sample))
    rows: list[Iterable[Any]] = [[sample.get(name) for name in columns] for sample in samples]
    run.log({"samples": wandb.Table(columns=[*columns], data=rows, allow_mixed_types=True)})
