from __future__ import annotations

import ast
import base64
import os
import re
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from kvbench.errors import ConfigError, RecordError
from kvbench.results import files as durable
from kvbench.results.files import (
    canonical_json,
    link_over,
    locked,
    pack,
    replace_file,
    replacing,
    unpack,
    write_new,
    write_out,
)

REPO = Path(__file__).parents[2]
WRITING_METHODS = {"write_text", "write_bytes", "replace", "rename", "hardlink_to"}
WRITING_CALLS = {"NamedTemporaryFile", "TemporaryFile", "mkstemp", "mkdtemp"}
MAY_WRITE = re.compile(rf"{'|'.join((WRITING_METHODS | WRITING_CALLS) - {'replace'})}|\bopen\(|\.replace\([^,]*\)")
WRITES_ELSEWHERE = {
    "kvbench/cli/fetch.py",  # what pip downloads, in a folder of its own until it is whole
    "kvbench/tasks/memory.py",  # a switch of the kernel under /proc
    "kvbench/sweep/process.py",  # a log is appended to
    "kvbench/sweep/worker.py",  # as it is by the process that gets its job late
    "kvbench/results/store.py",  # a file without a name, whose date is the clock of the disk; sets damaged files aside
}


def in_folder(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("write", [write_new, replace_file, write_out])
def test_a_file_is_written_whole_with_its_folder_and_nothing_beside_it(
    tmp_path: Path, write: Callable[[Path, bytes], None]
) -> None:
    path = tmp_path / "new" / "folder" / f"{'n' * 250}.csv"
    write(path, b"all of it")
    assert path.read_bytes() == b"all of it"
    assert in_folder(path.parent) == [path.name]


def test_a_new_file_never_takes_the_place_of_another(tmp_path: Path) -> None:
    write_new(tmp_path / "a", b"first")
    with pytest.raises(FileExistsError):
        write_new(tmp_path / "a", b"second")
    assert (tmp_path / "a").read_bytes() == b"first"
    assert in_folder(tmp_path) == ["a"]


def test_writers_of_one_name_at_once_leave_the_whole_file_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, met, names = tmp_path / "a.csv", threading.Barrier(4), []
    real = durable.write_synced

    def together(temporary: Path, data: bytes) -> None:
        names.append(temporary)
        real(temporary, data)
        met.wait(20)  # every writer has written before any takes the name

    monkeypatch.setattr(durable, "write_synced", together)
    contents = [bytes([65 + number]) * 10_000 * (number + 1) for number in range(4)]
    writers = [threading.Thread(target=replace_file, args=(path, content)) for content in contents]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(set(names)) == 4, "no two writers share a temporary name"
    assert path.read_bytes() in contents
    assert in_folder(tmp_path) == ["a.csv"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("a library's own")])
def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path, error: Exception) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"old")

    def fail() -> None:
        with replacing(path) as temporary:
            temporary.write_bytes(b"half")
            raise error

    with pytest.raises((RecordError, ValueError)) as caught:
        fail()
    assert "Free some space" in str(caught.value) or caught.value is error
    assert path.read_bytes() == b"old"
    assert in_folder(tmp_path) == ["a.parquet"]


def test_a_second_name_takes_the_place_of_another_file_or_stays(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_text(name)
    link_over(tmp_path / "a", tmp_path / "b")
    link_over(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").samefile(tmp_path / "a")
    assert in_folder(tmp_path) == ["a", "b"]


def test_of_a_link_the_target_is_replaced_and_a_device_is_written_to(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link.csv").symlink_to(tmp_path / "real" / "a.csv")
    write_out(tmp_path / "link.csv", b"1")
    assert (tmp_path / "link.csv").is_symlink()
    assert (tmp_path / "real" / "a.csv").read_bytes() == b"1"
    write_out(Path(os.devnull), b"1")
    assert not Path(os.devnull).is_file()


def test_a_place_that_cannot_be_written_to_is_one_line_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    for path in (tmp_path, tmp_path / "file" / "a.csv", tmp_path / "circle" / "a.csv"):
        with pytest.raises(ConfigError, match=r"^cannot write .*; choose another --out$"):
            write_out(path, b"")


def test_a_lock_is_held_by_one_at_a_time_and_ends_with_its_block(tmp_path: Path) -> None:
    inside, most = [0], [0]

    def work() -> None:
        for _ in range(50):
            with locked(tmp_path / "report" / ".lock"):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                inside[0] -= 1

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert most == [1]
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "report" / ".lock"):
        _ = 1 / 0
    with locked(tmp_path / "report" / ".lock"):
        pass


def test_every_file_is_written_by_the_one_writer() -> None:
    found = {}
    for path in sorted([*REPO.glob("kvbench/**/*.py"), *REPO.glob("policies/**/*.py")]):
        name, text = path.relative_to(REPO).as_posix(), path.read_text(encoding="utf-8")
        if not MAY_WRITE.search(text):  # reading every tree takes a second
            continue
        if lines := [node.lineno for node in ast.walk(ast.parse(text)) if _writes(node)]:
            found[name] = lines
    assert found.keys() == WRITES_ELSEWHERE | {"kvbench/results/files.py"}


def _writes(node: ast.AST) -> bool:
    """Whether `node` calls something that writes or renames a file; str.replace has two arguments, Path.replace one."""
    if not isinstance(node, ast.Call):
        return False
    function = node.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    if name == "open":
        modes = [a.value for a in [*node.args, *(k.value for k in node.keywords)] if isinstance(a, ast.Constant)]
        return any(isinstance(mode, str) and set(mode) & set("wax+") and len(mode) <= 3 for mode in modes)
    if name in ("replace", "rename") and (len(node.args) != 1 or node.keywords):
        return False
    return name in WRITING_METHODS | WRITING_CALLS


ARRAY_SHAPES = arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=6)


@given(st.sampled_from([np.uint8, np.uint16]).flatmap(lambda kind: arrays.arrays(kind, ARRAY_SHAPES)))
def test_what_was_packed_comes_back(array: Any) -> None:
    again = unpack(pack(array))
    canonical_json(pack(array))
    assert again.dtype == array.dtype
    assert again.shape == array.shape
    assert np.array_equal(again, array)


def test_patterns_that_repeat_take_little_room() -> None:
    assert len(pack(np.tile(np.arange(700, dtype=np.uint16), (1024, 1)))["data"]) < 30_000


@pytest.mark.parametrize(
    "damage",
    [
        {"type": "f8"},
        {"shape": [2, 4]},
        {"shape": [-2, -3]},
        {"shape": [2**20, 2**20]},
        {"shape": "ab"},
        {"data": "not base64"},
        {"data": base64.b64encode(b"not zlib").decode()},
        {"data": base64.b64encode(zlib.compress(bytes(10**7))).decode()},
        {"data": None},
    ],
)
def test_a_damaged_array_is_an_error_of_one_line(damage: dict[str, Any]) -> None:
    with pytest.raises(RecordError, match="packed array is damaged"):
        unpack(pack(np.zeros((2, 3), dtype=np.uint16)) | damage)


@pytest.mark.parametrize("value", [None, 3, [], "text", {}])
def test_what_is_no_packed_array_is_an_error_of_one_line(value: Any) -> None:
    with pytest.raises(RecordError):
        unpack(value)
