"""Sweeps of 24 cells by 4 writers, killed at random instants and resumed until done."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from kvbench.report.load import load_results
from kvbench.report.tables import csv_text, quality_frame
from kvbench.results.claims import Claims
from kvbench.results.store import PartialStore, RecordStore
from tests.trust.fake_sweep import NUM_BATCHES, batch, cells, write

REPO = Path(__file__).parents[2]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder in memory where there is one: a kill is no power cut, and a sync of a busy disk takes long."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as name:
        yield Path(name)


def quality_table(folder: Path) -> str:
    results = load_results(folder)
    assert results.problems == ()
    return csv_text(quality_frame(results))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The quality table of one writer that nobody disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    write(folder, lambda *words: None)
    table = quality_table(folder)
    assert table.count("\n") == 1 + len(cells())
    return table


@cache
def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPO), "PYTHONDONTWRITEBYTECODE": "1"}


def torture(scenario: str, folder: Path, num_kills: int, seed: int) -> dict[str, int]:
    """Run the sweep in a process that has no torch and can fork writers in a millisecond."""
    command = [sys.executable, "-m", "tests.trust.crew", scenario, str(folder), str(num_kills), str(seed)]
    printed = subprocess.run(command, cwd=REPO, env=_environment(), capture_output=True, text=True, timeout=500)
    assert printed.returncode == 0, printed.stderr
    counts: dict[str, int] = json.loads(printed.stdout)
    return counts


def check(counts: dict[str, int], folder: Path, undisturbed: str, *also: str) -> None:
    nothing = ("missing", "lost", "foreign_cells", "torn", *also)
    assert {name: counts[name] for name in nothing} == dict.fromkeys(nothing, 0)
    assert quality_table(folder) == undisturbed
    assert len(list(folder.glob("cells/*/record.json"))) == len(cells())


def kill_until(scenario: str, folder: Path, num_kills: int, undisturbed: str) -> None:
    """Torture one sweep, and further ones if it was done before that many kills."""
    killed, number = 0, 0
    while killed < num_kills:
        results = folder / str(number)
        counts = torture(scenario, results, min(num_kills - killed, 60), seed=number)
        check(counts, results, undisturbed, "batches_left")
        assert counts["committed_twice"] == 0, "claims keep writers out of each other's cells"
        assert counts["measured_again"] <= counts["killed"], "a kill costs one batch at most"
        killed += counts["killed"]
        number += 1


@pytest.mark.few(1)
@pytest.mark.parametrize("num_kills", [5, pytest.param(50, marks=pytest.mark.long)])
def test_kills_lose_double_and_tear_nothing(folder: Path, undisturbed: str, num_kills: int) -> None:
    kill_until("one sweep", folder, num_kills, undisturbed)


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_a_thousand_kills_lose_double_and_tear_nothing(folder: Path, undisturbed: str) -> None:
    kill_until("one sweep", folder, 1000, undisturbed)


@pytest.mark.long
def test_two_sweeps_on_one_folder_do_not_disturb_each_other(folder: Path, undisturbed: str) -> None:
    kill_until("two sweeps", folder, 15, undisturbed)
    names = {body["sweep"] for key in cells() if (body := RecordStore(folder / "0").accepted(key)) is not None}
    assert names <= {"sweep 0", "sweep 1"}


@pytest.mark.long
def test_machines_whose_clocks_disagree_share_a_folder(folder: Path, undisturbed: str) -> None:
    """Each writer is another machine: only leases tell who died, clocks are off by up to ten minutes."""
    counts = torture("skewed clocks", folder, 8, seed=3)
    check(counts, folder, undisturbed)
    assert counts["killed"] == 8


@pytest.mark.few(1)
def test_a_cell_goes_on_after_its_last_whole_batch(folder: Path, undisturbed: str) -> None:
    key = next(iter(cells()))
    for number in range(NUM_BATCHES - 1):
        PartialStore(folder, key).commit(number, batch(key, number))
    (folder / "cells" / key[:16] / "batches" / "1.json").write_bytes(b'{"kvbench_batch":1,"body')
    said: list[tuple[object, ...]] = []
    write(folder, lambda *words: said.append(words))
    assert [words for words in said if words[:2] == ("measured", key)] == [("measured", key, 1), ("measured", key, 3)]
    assert quality_table(folder) == undisturbed


@pytest.mark.long
def test_a_table_without_one_cell_is_noticed(folder: Path, undisturbed: str) -> None:
    """The comparison above can fail: each of these is one wrong thing in an otherwise equal folder."""
    write(folder, lambda *words: None)
    assert quality_table(folder) == undisturbed
    key = next(iter(cells()))
    (folder / "cells" / key[:16] / "record.json").unlink()
    assert quality_table(folder) != undisturbed
    assert Claims(folder).take(key) is not None
