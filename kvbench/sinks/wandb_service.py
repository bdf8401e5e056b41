"""wandb as a library and its own process: silent, and never without a time limit."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import threading
from typing import TYPE_CHECKING

from kvbench.errors import ConfigError
from kvbench.sinks.wandb_fields import has_api_key

if TYPE_CHECKING:
    import wandb


def check_online() -> None:
    """Raise ConfigError if runs cannot go online, as was asked for; "auto" would keep them offline instead."""
    if importlib.util.find_spec("wandb") is None:
        raise ConfigError("sink.wandb.mode is 'online', but wandb is not installed; python -m pip install wandb")
    if not has_api_key(quiet_setup()):
        raise ConfigError(
            "sink.wandb.mode is 'online', but no API key was found; run `wandb login`, set WANDB_API_KEY, or use "
            "sink.wandb.mode=auto, which keeps runs offline until there is one"
        )


def quiet_setup() -> str:
    """Silence wandb in this process and return its server's address; no network."""
    # Its telemetry would hold up the end of the process for 30 s if the server does not answer.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    return str(wandb.setup(settings=wandb.Settings(silent=True)).settings.base_url)


def restart_service(limit_s: float) -> None:
    """End wandb's own process, which holds the id of a failed run and refuses it to the next one."""
    import wandb

    def end() -> None:
        with contextlib.suppress(Exception):
            wandb.teardown()

    # It waits for uploads without a limit of its own, so it gets a thread that can be left behind.
    thread = threading.Thread(target=end, daemon=True)
    thread.start()
    thread.join(limit_s)
    os.environ.pop("WANDB_SERVICE", None)  # a service shared with the parent process outlives teardown()


def run_settings(timeout_s: float) -> wandb.Settings:
    """Return the settings of one run: quiet, no sampling of the machine, limits on start and end."""
    import wandb

    return wandb.Settings(
        silent=True,
        console="off",
        disable_git=True,
        disable_code=True,
        save_code=False,
        disable_job_creation=True,
        # The machine and its load are in the record; sampling them would disturb the timed cells.
        x_disable_stats=True,
        x_disable_meta=True,
        x_disable_machine_info=True,
        x_save_requirements=False,
        init_timeout=timeout_s,
        login_timeout=timeout_s,
        finish_timeout=timeout_s,
        finish_timeout_raises=True,
    )
