from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from kvbench.results.record import MEASURED, STATUSES, CellRecord, read_cell, read_record
from kvbench.results.store import RecordStore
from tests.results.record_bodies import make_body

_WRITER = """
import sys
from pathlib import Path
from kvbench.results.store import RecordStore
from tests.results.record_bodies import make_body
store = RecordStore(Path(sys.argv[1]))
for seed in range(10_000):
    body = make_body(int(sys.argv[2]) * 10_000 + seed)
    store.commit(body)
    print(body["key"], flush=True)
"""


def test_a_committed_ok_record_is_accepted(tmp_path: Path) -> None:
    store, body = RecordStore(tmp_path), make_body()
    assert store.accepted(body["key"]) is None
    path = store.commit(body)
    assert path == tmp_path / "cells" / body["key"][:16] / f"attempt-{body['attempt']}.json"
    assert store.accepted(body["key"]) == body
    assert (path.parent / "record.json").samefile(path)


@pytest.mark.parametrize("status", MEASURED)
def test_a_measured_record_stays_until_it_is_replaced_on_request(tmp_path: Path, status: str) -> None:
    store, first, second, third = (
        RecordStore(tmp_path),
        make_body(status=status),
        make_body(),
        make_body(status="crash"),
    )
    for body in (first, second, third):
        store.commit(body)
    assert store.accepted(first["key"]) == first
    fourth = make_body(started_utc="2026-11-24T00:00:00+00:00")
    store.commit(fourth, replace=True)
    assert store.accepted(first["key"]) == fourth
    assert len(store.attempts(first["key"])) == 4
    assert store.attempts(first["key"])[-1] == fourth


@pytest.mark.parametrize("status", [status for status in STATUSES if status not in MEASURED])
def test_a_failure_never_replaces_a_measurement_even_on_request(tmp_path: Path, status: str) -> None:
    store, good, failed = RecordStore(tmp_path), make_body(), make_body(status=status)
    store.commit(good)
    store.commit(failed, replace=True)
    assert store.accepted(good["key"]) == good
    assert read_record(store.record_file(good["key"])) == good
    assert [body["status"] for body in store.attempts(good["key"])].count(status) == 1, "the failure is kept"


def failure_in_place_of(folder: Path, *measured: dict[str, Any], failed: dict[str, Any]) -> RecordStore:
    """Leave what kvbench 0.1 left after force=true and a failure: record.json is the failed attempt."""
    store = RecordStore(folder)
    for body in (*measured, failed):
        store.commit(body)
    record = store.record_file(failed["key"])
    record.unlink()
    os.link(record.with_name(f"attempt-{failed['attempt']}.json"), record)
    return store


def test_where_a_failure_took_the_place_the_newest_measured_attempt_counts_and_gets_it_back(tmp_path: Path) -> None:
    old, new = make_body(), make_body(started_utc="2026-11-24T00:00:00+00:00", status="noisy")
    failed = make_body(status="oom", started_utc="2026-11-25T00:00:00+00:00")
    store = failure_in_place_of(tmp_path, new, old, failed=failed)
    folder = store.cell_folder(old["key"])
    assert store.accepted(old["key"]) == new
    assert read_cell(folder) == CellRecord(body=new, later_failures=(failed,), num_measured=2)
    crash = make_body(status="crash", started_utc="2026-11-26T00:00:00+00:00")
    store.commit(crash)
    assert read_record(folder / "record.json") == new
    assert read_cell(folder).later_failures == (failed, crash)


def test_a_failure_before_the_measurement_is_none_after_it(tmp_path: Path) -> None:
    store, good = RecordStore(tmp_path), make_body(started_utc="2026-11-24T00:00:00+00:00")
    store.commit(make_body(status="killed"))
    store.commit(good)
    assert read_cell(store.cell_folder(good["key"])) == CellRecord(body=good)


def test_a_failed_record_gives_way_to_any_newer_attempt(tmp_path: Path) -> None:
    store, crash, oom, ok = RecordStore(tmp_path), make_body(status="crash"), make_body(status="oom"), make_body()
    record = store.cell_folder(ok["key"]) / "record.json"
    store.commit(crash)
    assert store.accepted(ok["key"]) is None
    store.commit(oom)
    assert read_record(record)["status"] == "oom"
    store.commit(ok)
    assert store.accepted(ok["key"]) == ok
    assert sorted(path.name[:7] for path in record.parent.iterdir()) == ["attempt"] * 3 + ["record."]


@pytest.mark.parametrize("damage", ["torn", "folder", "other cell", "dead link"])
def test_a_damaged_record_is_reported_once_set_aside_and_measured_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    store, body = RecordStore(tmp_path), make_body()
    store.commit(body)
    record = store.cell_folder(body["key"]) / "record.json"
    _damage(record, damage, tmp_path)
    assert store.accepted(body["key"]) is None
    assert store.accepted(body["key"]) is None
    assert len(caplog.records) == 1
    assert str(record) in caplog.text
    again = make_body()
    store.commit(again)
    assert store.accepted(body["key"]) == again
    assert len(list(record.parent.glob("damaged-*"))) == 1


def _damage(record: Path, damage: str, folder: Path) -> None:
    record.unlink()
    if damage == "torn":
        record.write_text('{"kvbench_record":1,')
    elif damage == "folder":
        record.mkdir()
    elif damage == "other cell":
        os.link(RecordStore(folder / "other").commit(make_body(1)), record)
    else:
        record.symlink_to("nowhere")


def test_a_damaged_attempt_is_left_out(tmp_path: Path) -> None:
    store, body = RecordStore(tmp_path), make_body()
    store.commit(body)
    (store.cell_folder(body["key"]) / "attempt-x.json").write_text("{")
    assert store.attempts(body["key"]) == [body]
    assert store.attempts("0" * 64) == []


def _race(folder: Path, process: int, start: Any) -> None:
    store = RecordStore(folder)
    start.wait()
    for seed in range(25):
        status = "ok" if process % 2 == 0 else "crash"
        store.commit(make_body(seed, status=status, duration_s=float(process)))


def test_of_racing_processes_exactly_one_is_accepted(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(4)
    processes = [context.Process(target=_race, args=(tmp_path, number, start)) for number in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    store = RecordStore(tmp_path)
    for seed in range(25):
        key = make_body(seed)["key"]
        accepted = store.accepted(key)
        assert accepted is not None  # an ok one, though two processes committed crashes
        assert len(store.attempts(key)) == 4
        assert accepted in store.attempts(key)
        assert len(list(store.cell_folder(key).iterdir())) == 5


@pytest.mark.parametrize(
    "waits_s", [(0.05, 0.17), pytest.param((0.05, 0.11, 0.17, 0.23, 0.31), marks=pytest.mark.long)]
)
def test_a_kill_loses_no_acknowledged_record(tmp_path: Path, waits_s: tuple[float, ...]) -> None:
    for round_number, wait_s in enumerate(waits_s):
        folder = tmp_path / str(round_number)
        acknowledged = _write_until_killed(folder, wait_s)
        store = RecordStore(folder)
        assert len(acknowledged) > 0
        assert all(store.accepted(key) is not None for key in acknowledged)
        stored = [path for path in folder.glob("cells/*/*.json") if not path.name.startswith(".")]
        assert all(read_record(path)["status"] == "ok" for path in stored)


def _write_until_killed(folder: Path, wait_s: float) -> list[str]:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(folder), str(number)],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=root,
        )
        for number in range(2)
    ]
    first_lines = [writer.stdout.readline() for writer in writers if writer.stdout is not None]
    time.sleep(wait_s)
    for writer in writers:
        writer.send_signal(signal.SIGKILL)
    rest = [line for writer in writers for line in writer.communicate()[0].splitlines(keepends=True)]
    return [line.strip() for line in [*first_lines, *rest] if line.endswith("\n")]


@pytest.mark.long
def test_a_thousand_finished_cells_are_checked_in_seconds(tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    samples = [{"id": f"scenes/test/{n}", "text": "word " * 60, "nll_sum": n / 7} for n in range(48)]
    body = make_body(samples=samples)
    store.commit(body)
    started_s = time.process_time()
    for _ in range(100):
        assert store.accepted(body["key"]) is not None
    took_s, started_s = time.process_time() - started_s, time.process_time()
    for _ in range(100):
        json.loads(json.dumps(body))
    assert took_s < 20 * (time.process_time() - started_s), "about as long as to read and write its JSON"
