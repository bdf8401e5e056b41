"""Weights & Biases as a mirror: one run per cell, online if it can be, else kept in a folder.

The run id comes from the cell key, so a cell that is measured or uploaded again lands on the same
run. Nothing here can stop or hang a sweep: starting and finishing an online run have a time limit,
and after the first failure the rest of the sweep is kept offline, with one line that says how to upload.

One W&B run, whatever it shows: started, filled and ended within a time limit.

write_run(RunSpec(id=key[:16], ...), place, "offline")

wandb as a library and its own process: silent, inside the results folder, and never without a time limit.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import netrc
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from kvbench.errors import ConfigError, KvbenchError, RecordError
from kvbench.results.files import make_folder, seal, unseal, write_new

if TYPE_CHECKING:
    import wandb


Mode = Literal["online", "offline", "disabled"]
MODES = ("auto", "online", "offline", "disabled")
_RESTART_S = 5.0  # nothing is worth waiting for: the run is written again
_NOT_IN_PROJECTS = "/\\#?%:"
_FOLDERS = {"WANDB_DATA_DIR": "staged", "WANDB_CACHE_DIR": "cache"}


def check_online(setting: str = "sink.wandb.mode", offline: str = "sink.wandb.mode=auto") -> None:
    """Raise ConfigError if runs cannot go online, as was asked for by `setting`; `offline` would keep them here."""
    check_installed(f"{setting} is 'online'")
    if not has_api_key(quiet_setup()):
        raise ConfigError(
            f"{setting} is 'online', but no API key was found; run `wandb login`, set WANDB_API_KEY, or use "
            f"{offline}, which keeps runs offline until there is one"
        )


def check_installed(why: str, package: str = "wandb", install: str = "") -> None:
    """Raise ConfigError if the Python module of `package` is not there; `install` if another name brings it."""
    if importlib.util.find_spec(package.replace("-", "_")) is None:
        raise ConfigError(f"{why}, but {package} is not installed; python -m pip install {install or package}")


def check_project(name: str, setting: str = "--project") -> None:
    """Raise ConfigError if W&B would refuse `name` as that of a project, at every run."""
    if not name or len(name) > 128 or set(name) & set(_NOT_IN_PROJECTS):
        raise ConfigError(
            f"{setting} is {name[:60]!r}; it must have 1 to 128 letters and none of {' '.join(_NOT_IN_PROJECTS)}"
        )


def resolve_mode(wanted: str) -> tuple[Mode, str]:
    """Return the mode that `wanted` (one of MODES) comes to here, and, if it is offline, why."""
    asked = os.environ.get("WANDB_MODE", "")
    wanted = asked if wanted == "auto" and asked in MODES else wanted
    if wanted == "disabled":
        return "disabled", ""
    if wanted == "offline":
        return "offline", "as asked"
    # Without this check wandb would stop and ask for a key at a terminal.
    return ("online", "") if has_api_key(quiet_setup()) else ("offline", "no API key; see wandb login")


def quiet_setup() -> str:
    """Silence wandb in this process and return its server's address; no network.

    Raises: ConfigError if a WANDB_... variable holds what wandb does not know.
    """
    # Its telemetry would hold up the end of the process for 30 s if the server does not answer.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb
    from pydantic import ValidationError

    try:
        return str(wandb.setup(settings=wandb.Settings(silent=True)).settings.base_url)
    except ValidationError as error:
        found = error.errors()[0]
        name = f"WANDB_{'_'.join(map(str, found['loc'])).upper()}"
        allowed = found["msg"].replace("Input should", "it must")
        raise ConfigError(f"{name} is {found['input']!r} in the environment; {allowed}; correct or unset it") from error


@contextlib.contextmanager
def own_folders(folder: Path) -> Iterator[None]:
    """Let wandb stage and cache below `folder`; a run that is kept offline would else leave its tables in the home."""
    unset = [name for name in _FOLDERS if name not in os.environ]
    os.environ.update({name: str(folder.resolve() / "wandb" / _FOLDERS[name]) for name in unset})
    try:
        yield
    finally:
        for name in unset:
            os.environ.pop(name, None)


def restart_service(timeout_s: float) -> None:
    """End wandb's own process, which holds the id of a failed run and refuses it to the next one.

    It is waited for as long as for a run, and never longer than a few seconds.
    """
    import wandb

    def end() -> None:
        with contextlib.suppress(Exception):
            wandb.teardown()

    within(min(timeout_s, _RESTART_S), end)
    os.environ.pop("WANDB_SERVICE", None)  # a service shared with the parent process outlives teardown()


def reason_of(error: Exception) -> str:
    """Return what went wrong as one short line; wandb's errors span many, and some say nothing."""
    return " ".join(str(error).split())[:160] or type(error).__name__


def within(limit_s: float, work: Callable[[], None]) -> bool:
    """Do `work`, but wait for it no longer than `limit_s`; return whether it ended."""
    # wandb waits for its server without a limit of its own, so it gets a thread that can be left behind.
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(limit_s)
    return not thread.is_alive()


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
        # Not where it runs, nor from which folder: the record says what a reader needs to know.
        host="",
        program="kvbench",
        x_save_requirements=False,
        init_timeout=timeout_s,
        login_timeout=timeout_s,
        finish_timeout=timeout_s,
        finish_timeout_raises=True,
    )


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


_KIND, _VERSION = "kvbench_wandb_sent", 1


def is_sent(folder: Path, target: str, run_id: str, digest: str) -> bool:
    """Tell whether content of `digest` was sent as `run_id` to `target`; a damaged file counts as not sent."""
    try:
        body = unseal(_path(folder, target, run_id, digest), _KIND, _VERSION, "Delete it; the run is sent again.")
    except RecordError:
        return False
    return body == _body(target, run_id, digest)


def note_sent(folder: Path, target: str, run_id: str, digest: str) -> None:
    """Keep that content of `digest` was sent as `run_id` to `target`; a disk that refuses costs a second upload."""
    path, data = _path(folder, target, run_id, digest), seal(_KIND, _VERSION, _body(target, run_id, digest))
    with contextlib.suppress(OSError):
        if path.exists() and path.read_bytes() != data:
            path.unlink()
    with contextlib.suppress(OSError, KvbenchError):
        write_new(path, data)


def _path(folder: Path, target: str, run_id: str, digest: str) -> Path:
    name = hashlib.sha256(f"{target}\n{digest}".encode()).hexdigest()[:16]
    return folder / "wandb" / "sent" / f"{run_id}-{name}.json"


def _body(target: str, run_id: str, digest: str) -> dict[str, str]:
    # A server's URL may hold a password.
    return {"target": hashlib.sha256(target.encode()).hexdigest(), "run": run_id, "digest": digest}


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
