"""One W&B run, whatever it shows: started, filled and ended silently, inside the results folder, within a time limit.

    write_run(RunSpec(id=key[:16], ...), place, "offline")

The run id comes from the cell key, so a cell that is measured or uploaded again lands on the same run. What was sent
already is kept in small sealed files that may be lost, one per run, content and destination; any number of processes
may write them, and losing one costs a second upload, which lands on the same run:

    <folder>/wandb/sent/<run id>-<digest>.json
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import netrc
import os
import shlex
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from kvbench.errors import ConfigError, KvbenchError, RecordError
from kvbench.results.files import make_folder, replace_file, seal, unseal

if TYPE_CHECKING:
    import wandb


Online = Literal["online", "offline"]
Mode = Literal[Online, "disabled"]
MODES = ("auto", "online", "offline", "disabled")
_KIND = "kvbench_wandb_sent"
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


def keep_note(path: Path, kind: str, body: dict[str, Any]) -> None:
    """Seal a small file that may be lost; a disk that refuses costs what the note would have saved."""
    with contextlib.suppress(OSError, KvbenchError):
        replace_file(path, seal(kind, 1, body))


def kept_note(path: Path, kind: str) -> dict[str, Any]:
    """Return what `keep_note` was given, nothing if the file is missing or damaged."""
    try:
        return unseal(path, kind, 1, "Delete it.")
    except RecordError:
        return {}


def is_sent(folder: Path, target: str, run_id: str, digest: str) -> bool:
    """Tell whether content of `digest` was sent as `run_id` to `target`; a damaged file counts as not sent."""
    path, body = _note_of(folder, target, run_id, digest)
    return kept_note(path, _KIND) == body


def note_sent(folder: Path, target: str, run_id: str, digest: str) -> None:
    """Keep that content of `digest` was sent as `run_id` to `target`; a disk that refuses costs a second upload."""
    path, body = _note_of(folder, target, run_id, digest)
    keep_note(path, _KIND, body)


def _note_of(folder: Path, target: str, run_id: str, digest: str) -> tuple[Path, dict[str, Any]]:
    name = hashlib.sha256(f"{target}\n{digest}".encode()).hexdigest()[:16]
    # A server's URL may hold a password.
    body = {"target": hashlib.sha256(target.encode()).hexdigest(), "run": run_id, "digest": digest}
    return folder / "wandb" / "sent" / f"{run_id}-{name}.json", body


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where runs go: a project on a server, and `folder`/wandb, where wandb keeps its files."""

    project: str
    entity: str | None
    folder: Path
    timeout_s: float

    @property
    def files(self) -> Path:
        """The folder of wandb's files."""
        return (self.folder / "wandb").resolve()

    @property
    def upload_command(self) -> str:
        """What uploads the runs that were kept offline."""
        return f"wandb sync {shlex.quote(str(self.files))}/offline-run-*"

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

    settings = wandb.Settings(
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
        init_timeout=place.timeout_s,
        login_timeout=place.timeout_s,
        finish_timeout=place.timeout_s,
        finish_timeout_raises=True,
    )
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
        settings=settings,
    )


def has_api_key(server: str) -> bool:
    """Tell, without the network, whether wandb would find a key for `server` (a URL)."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    hosts: set[str] = set()
    for name in [os.environ["NETRC"]] if "NETRC" in os.environ else ["~/.netrc", "~/_netrc"]:
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            hosts |= set(netrc.netrc(str(Path(name).expanduser())).hosts)
    return not hosts.isdisjoint({urlsplit(server).netloc, "api.wandb.ai"})
