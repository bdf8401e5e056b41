"""Disks that are full, read-only or sick: an error in one line, nothing wrong stored, and the sweep goes on later."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvbench.errors import ConfigError, KvbenchError, RecordError
from kvbench.results.claims import Claims
from kvbench.results.store import PartialStore, RecordStore
from tests.results.record_bodies import make_body
from tests.trust.fake_sweep import cells, write
from tests.trust.test_kills import REPO, folder, quality_table, torture, undisturbed

__all__ = ["folder", "undisturbed"]


def _mounted(point: Path, *options: str) -> Path:
    done = subprocess.run(["mount", *options, str(point)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"file systems cannot be mounted here: {done.stderr.strip()}")
    return point


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 100 KiB."""
    (tmp_path / "disk").mkdir()
    point = _mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=100k", "tmpfs")
    yield point
    subprocess.run(["umount", "--lazy", str(point)], check=True)


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A results folder with one record on a file system that was made read-only; root may not write it either."""
    (tmp_path / "disk").mkdir()
    point = _mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=1m", "tmpfs")
    RecordStore(point).commit(make_body())
    subprocess.run(["mount", "-o", "remount,ro", str(point)], check=True)
    yield point
    subprocess.run(["umount", "--lazy", str(point)], check=True)


@pytest.mark.parametrize(
    ("num_cells", "faults"),
    [
        pytest.param(1, ["ENOSPC", "short write"], id="full disk"),
        pytest.param(2, ["ENOSPC", "EIO", "EDQUOT", "short write"], id="every fault", marks=pytest.mark.long),
    ],
)
def test_whichever_call_fails_nothing_wrong_is_stored_and_a_resume_completes(
    folder: Path, num_cells: int, faults: list[str]
) -> None:
    command = [sys.executable, "-m", "tests.trust.faulty", str(folder), str(num_cells), *faults]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["wrong"] == [], done.stderr
    assert seen["runs"] > 60 * num_cells, "every call was made to fail once"


@pytest.mark.long
@pytest.mark.parametrize("num_kills", [0, pytest.param(10, marks=pytest.mark.long)])
def test_a_full_disk_stops_with_one_line_and_the_sweep_ends_when_there_is_space(
    small_disk: Path, undisturbed: str, num_kills: int
) -> None:
    said: list[tuple[object, ...]] = []
    with pytest.raises(KvbenchError, match=r"Free some space and run again; finished cells are kept\.$"):
        write(small_disk, lambda *words: said.append(words))
    committed = {str(key) for what, key, _ in said if what == "committed"}
    store = RecordStore(small_disk)
    assert committed == {key for key in cells() if store.accepted(key) is not None}
    assert 0 < len(committed) < len(cells())
    assert not list(small_disk.glob("**/.*.tmp")), "a half-written file would keep the disk full"
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    if num_kills:
        counts = torture("one sweep", small_disk, num_kills, seed=1)
        assert (counts["missing"], counts["lost"], counts["torn"]) == (0, 0, 0)
    else:
        write(small_disk, lambda *words: None)
    assert quality_table(small_disk) == undisturbed


def test_a_read_only_folder_is_a_configuration_error_and_can_still_be_read(read_only: Path) -> None:
    store = RecordStore(read_only)
    with pytest.raises(ConfigError, match="Read-only file system"):
        store.commit(make_body(1))
    with pytest.raises(ConfigError, match="Read-only file system"):
        Claims(read_only).take(make_body(1)["key"])
    with pytest.raises(ConfigError, match="Read-only file system"):
        PartialStore(read_only, make_body(1)["key"]).commit(0, {})
    assert store.accepted(make_body()["key"]) is not None


def test_a_file_in_the_place_of_the_folder_is_a_configuration_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="must be a writable folder"):
        RecordStore(tmp_path / "file").commit(make_body())


def test_a_file_system_without_hard_links_is_a_configuration_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(source: object, target: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", no_links)
    with pytest.raises(ConfigError, match="with hard links"):
        RecordStore(tmp_path).commit(make_body())
    assert not list(tmp_path.glob("**/*.json"))
    assert not list(tmp_path.glob("**/.*"))


def test_a_record_that_no_disk_takes_is_an_error_and_not_a_short_file(small_disk: Path) -> None:
    with pytest.raises(RecordError, match="No space left"):
        RecordStore(small_disk).commit(make_body(samples=[{"id": "1", "text": "x" * 400_000}]))
    assert [path for path in small_disk.glob("**/*") if path.is_file()] == []
