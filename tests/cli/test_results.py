"""`kvbench results` on a folder of a finished fake sweep, and on the same folder damaged in every way."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from kvbench.cli.main import run
from kvbench.report.load import load_results
from kvbench.report.page import render_page
from kvbench.results.claims import Claims
from kvbench.results.record import cell_key, read_record
from kvbench.results.store import PartialStore, RecordStore, leftovers, verify
from kvbench.sinks.wandb.content import cell_digest
from kvbench.sinks.wandb.sync import jobs_of
from tests.covering import one_in
from tests.report import synthetic
from tests.results.record_bodies import make_body
from tests.trust.fake_sweep import body_of, cells, write

REPO = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    write(folder, lambda *words: None)
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged; hard links inside it are kept."""
    subprocess.run(["cp", "-a", str(finished), str(tmp_path / "results")], check=True)
    return tmp_path / "results"


def printed(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> str:
    assert run(["results", *map(str, words)]) == code
    return capsys.readouterr().out


def first_cell(folder: Path) -> Path:
    return RecordStore(folder).cell_folder(next(iter(cells())))


def test_the_traceback_of_a_failed_cell_is_shown_line_by_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = synthetic.body(policy="h2o", status="crash")
    failed["error"] = {"type": "E", "message": "no", "traceback": "a\n  b\x1b\n"}
    synthetic.write_cell(tmp_path, failed)
    shown = printed(capsys, "show", tmp_path, failed["key"])
    assert "  traceback:\n    a\n      b?\n" in shown
    assert "  message: no\n" in shown


def test_list_shows_a_line_per_cell_and_selects(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, "list", finished).splitlines()
    assert len(lines) == 25
    assert lines[-1] == "24 cells, 0 problems"
    assert {line.split()[0] for line in lines[:-1]} == {key[:16] for key in cells()}
    assert all(" on " in line for line in lines[:-1]), "model and data set"
    assert printed(capsys, "list", finished, "--policy", "h2o").count(" h2o ") == 4
    assert "8 cells" in printed(capsys, "list", finished, "--policy", "h2o", "--policy", "full")
    assert "24 cells" in printed(capsys, "list", finished, "--sweep", "s", "--status", "ok")
    assert "0 cells" in printed(capsys, "list", finished, "--status", "oom")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("list FOLDER --policy h20", "--policy is 'h20'; did you mean 'h2o'?"),
        ("list FOLDER --status okay", "--status is 'okay'; did you mean 'ok'?"),
        ("list FOLDER --sweep nope", "no record belongs to the sweep 'nope'"),
        ("lst FOLDER", "the command is 'lst'; did you mean 'list'?"),
        ("", "the following arguments are required: COMMAND"),
        ("list nowhere", "the results folder nowhere does not exist"),
        ("verify nowhere", "the results folder nowhere does not exist"),
        ("gc nowhere", "the results folder nowhere does not exist"),
        ("show FOLDER zzzz", "key is 'zzzz'; no cell has it"),
        ("csv FOLDER --samples --quality", "--samples and --quality are different tables; give one of them"),
        ("csv FOLDER --samples --long", "--samples and --long are different tables"),
        ("csv FOLDER --out /dev/null/x.csv", "cannot write /dev/null/x.csv: File exists; choose another --out"),
        ("parquet FOLDER --out /dev/null/x", "cannot write /dev/null/x: "),
        ("list FOLDER --all", "unrecognized arguments: --all"),
    ],
)
def test_a_mistake_is_one_line(finished: Path, line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["results", *line.replace("FOLDER", str(finished)).split()]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.count("\n") == 1
    assert message in told.err


def test_show_prints_one_cell_by_the_first_digits_of_its_key(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = next(iter(cells()))
    text = printed(capsys, "show", finished, key[:10])
    body = RecordStore(finished).accepted(key)
    assert body is not None
    for part in (key, "ppl: ", "policy: ", "attempts", body["attempt"], "pid: "):
        assert part in text
    assert json.loads(printed(capsys, "show", finished, key, "--json")) == body


@pytest.mark.long
@pytest.mark.cover("one")
@pytest.mark.parametrize("took_the_place", [False, True])
def test_a_later_failure_is_shown_and_every_table_keeps_the_measured_numbers(
    folder: Path, took_the_place: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    store, (key, settings) = RecordStore(folder), next(iter(cells().items()))
    good = store.accepted(key)
    assert good is not None
    before = [printed(capsys, "csv", folder, *options) for options in ([], ["--samples"], ["--quality"])]
    error = {"type": "KeyboardInterrupt", "message": "Ctrl-C", "traceback": ""}
    failed = body_of(key, settings, {0: {"nll": [1.0]}}, "s")
    failed |= {"status": "killed", "error": error, "measurements": {}, "samples": []}
    failed |= {"started_utc": "2999-01-01T00:00:00.000+00:00"}
    attempt = store.commit(failed, replace=True)
    if took_the_place:  # as kvbench 0.1 left it
        store.record_file(key).unlink()
        os.link(attempt, store.record_file(key))
    assert [printed(capsys, "csv", folder, *options) for options in ([], ["--samples"], ["--quality"])] == before
    listed = printed(capsys, "list", folder)
    assert "24 cells, 1 problems" in listed
    assert f"{attempt.name}: this later attempt of 2999-01-01T00:00:00 failed (killed: KeyboardInterrupt" in listed
    assert "killed" in printed(capsys, "show", folder, key).split("attempts")[1]
    assert json.loads(printed(capsys, "show", folder, key, "--json")) == good
    assert [job.digest for job in jobs_of(folder, "s", folder)].count(cell_digest(good)) == 1
    assert "this later attempt" in render_page(load_results(folder), [])


@pytest.mark.long
@pytest.mark.parametrize(
    "kinds", [[[]], pytest.param([["--samples"], ["--quality"], ["--long"]], marks=pytest.mark.long)]
)
def test_csv_and_parquet_hold_the_same_and_have_the_same_bytes_each_time(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kinds: list[list[str]]
) -> None:
    for options in kinds:
        text = printed(capsys, "csv", finished, *options)
        assert printed(capsys, "csv", finished, *options) == text
        printed(capsys, "csv", finished, *options, "--out", tmp_path / "t.csv")
        assert (tmp_path / "t.csv").read_text() == text
        printed(capsys, "parquet", finished, *options, "--out", tmp_path / "t.parquet")
        table = pd.read_csv(io.StringIO(text))
        num_rows = {"--samples": 24 * 128, "--long": 24 * 2}.get("".join(options), 24)
        assert len(table) == len(pd.read_parquet(tmp_path / "t.parquet")) == num_rows
    quality = pd.read_csv(io.StringIO(printed(capsys, "csv", finished, "--quality")))
    assert not {"tpot_ms", "sweep", "started_utc", "duration_s", "kv_stored_bytes"} & set(quality.columns)
    assert quality["ppl"].notna().all()


def test_the_table_is_printed(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "table", finished, "--policy", "h2o")
    assert "PPL" in text
    assert "h2o" in text
    assert "snapkv" not in text


def test_a_file_or_a_pipe_gets_a_real_table_and_not_a_card_per_cell(
    finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    lines = printed(capsys, "table", finished).splitlines()
    (heads,) = [line for line in lines if line.startswith(" policy ") and " budget " in line and " PPL " in line]
    rows = [line for line in lines if line.startswith(" h2o ") and len(line) == len(heads)]
    ends = {len(line[: heads.index("PPL") + 3].rstrip()) for line in rows}
    assert len(rows) == 4, "a cell is a row"
    assert ends == {heads.index("PPL") + 3}, "of numbers in one column"
    assert not any(line.startswith("  PPL") for line in lines), "a card has a line per number"
    monkeypatch.setenv("COLUMNS", "60")
    assert max(map(len, printed(capsys, "table", finished).splitlines())) <= 60, "who says how wide is heard"


def test_a_sound_folder_verifies(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "verify", finished) == "24 records and 24 attempts hold; 0 problems\n"


PUBLISHED = sorted(path.parent for path in (REPO / "results" / "published").glob("*/cells"))


@pytest.mark.parametrize("published", PUBLISHED, ids=lambda path: path.name)
def test_what_is_published_holds_by_the_schema_that_it_states(published: Path) -> None:
    seen = verify(published)
    assert seen.num_records == len(list(published.glob("cells/*/record.json"))) > 0
    assert not seen.problems


@pytest.mark.parametrize("name", one_in(3, [path.name for path in PUBLISHED]))
def test_a_published_table_is_what_its_command_prints_of_the_records_beside_it(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    published = REPO / "results" / "published" / name
    assert printed(capsys, "csv", published) == (published / "table.csv").read_text(encoding="utf-8")


def test_a_record_whose_classes_have_moved_since_holds_and_nothing_of_it_is_imported(tmp_path: Path) -> None:
    settings = {"policy": {"_target_": "gone_since.mine.H2O", "source": "0"}, "seed": 0}
    old = make_body(schema=1, cell=settings, key=cell_key(settings, schema=1))
    new = make_body(cell=settings, key=cell_key(settings))
    for body in (old, new, make_body(2, schema=1)):
        RecordStore(tmp_path).commit(body)
    seen = verify(tmp_path)
    assert old["key"] != new["key"]
    assert (seen.num_records, [problem.path[:22] for problem in seen.problems]) == (
        2,
        [f"cells/{make_body(2)['key'][:16]}"] * 2,
    ), "a key of one schema is none of another"
    assert "gone_since" not in sys.modules


def _other_key(cell: Path) -> None:
    key, settings = list(cells().items())[1]
    body = body_of(key, settings, {0: {"nll": [1.0]}}, "s")
    RecordStore(cell.parents[1] / "other").commit(body)
    (cell / "record.json").unlink()
    os.link(cell.parents[1] / "other" / "cells" / key[:16] / "record.json", cell / "record.json")
    shutil.rmtree(cell.parents[1] / "other")


def _other_settings(cell: Path) -> None:
    body = read_record(cell / "record.json")
    shutil.rmtree(cell)
    RecordStore(cell.parents[1]).commit({**body, "cell": {**body["cell"], "fraction": 0.99}})


def _newer(cell: Path) -> None:
    text = (cell / "record.json").read_text()
    (cell / "record.json").unlink()
    (cell / "record.json").write_text(text.replace('"kvbench_record":1', '"kvbench_record":2', 1))


def _replaced(content: bytes) -> Callable[[Path], None]:
    def damage(cell: Path) -> None:
        (cell / "record.json").unlink()
        (cell / "record.json").write_bytes(content)

    return damage


def _attempt_gone(cell: Path) -> None:
    next(cell.glob("attempt-*")).unlink()


def _torn_batch(cell: Path) -> None:
    PartialStore(cell.parents[1], next(iter(cells()))).commit(0, {})
    (cell / "batches" / "0.json").write_text("{")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (_replaced(b""), "is torn or is not JSON"),
    "torn": (_replaced(b'{"kvbench_record":1,'), "is torn or is not JSON"),
    "foreign": (_replaced(b"[1, 2]"), "is not a kvbench record"),
    "binary": (_replaced(b"\x80\x04\x95\xff"), "is not UTF-8 text"),
    "deep": (_replaced(b"[" * 100_000), "is torn or is not JSON"),
    "newer": (_newer, "version 2; this kvbench reads 1"),
    "of another cell": (_other_key, "belongs to the cell"),
    "with other settings": (_other_settings, "do not give its key"),
    "without its attempt": (_attempt_gone, "is none of the attempts beside it"),
    "stray file": (lambda cell: (cell / "notes.txt").write_text("x"), "is not a file of kvbench"),
    "stray folder": (lambda cell: (cell.parent / "mine").mkdir(), "is not the folder of a cell"),
    "torn batch": (_torn_batch, "holds a batch that cannot be used: 0.json"),
    "pipe": (lambda cell: os.mkfifo(cell / f"attempt-{'0' * 32}.json"), "is not a file"),
    "folder": (lambda cell: (cell / f"attempt-{'0' * 32}.json").mkdir(), "is not a file"),
}


@pytest.mark.parametrize("damage", one_in(12, DAMAGES))
def test_a_damaged_folder_is_told_apart_and_the_rest_is_used(
    folder: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make, message = DAMAGES[damage]
    make(first_cell(folder))
    text = printed(capsys, "verify", folder, code=1)
    lines = [line for line in text.splitlines() if line.startswith("problem: ")]
    assert len(lines) == (2 if damage == "with other settings" else 1), "the attempt is the same file"
    assert all(message in line and line.startswith("problem: cells/") for line in lines)
    listed = printed(capsys, "list", folder).splitlines()
    assert sum(" ok " in line for line in listed) in (23, 24)
    table = pd.read_csv(io.StringIO(printed(capsys, "csv", folder)))
    assert len(table) in (23, 24)
    assert set(table["key"]) <= set(cells())


def test_every_truncation_and_many_flipped_bits_are_noticed(folder: Path) -> None:
    path = first_cell(folder) / "record.json"
    for other in set((folder / "cells").iterdir()) - {path.parent}:
        shutil.rmtree(other)
    data = path.read_bytes()
    path.unlink()
    for step in range(60):
        path.write_bytes(data[: len(data) * step // 60])
        assert len(verify(folder / ".").problems) == 1
        flipped = bytearray(data)
        flipped[len(data) * step // 60] ^= 1 << step % 8
        path.write_bytes(flipped)
        assert len(verify(folder).problems) == 1


def age(path: Path) -> None:
    os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 2 * 86_400))


def test_batches_go_although_the_writer_that_was_killed_after_its_record_left_its_lease(folder: Path) -> None:
    key = next(iter(cells()))
    PartialStore(folder, key).commit(0, {})
    claim = folder / "claims" / f"{key[:16]}.1"
    claim.write_bytes(b"damaged")
    assert leftovers(folder) == [], "someone may be measuring the cell afresh"
    age(claim)
    assert [leftover.path for leftover in leftovers(folder)] == [first_cell(folder) / "batches", claim]


@pytest.mark.parametrize("wrong_s", [-10.0 * 86_400, 10.0 * 86_400])
def test_files_age_by_the_clock_that_dates_them_and_not_by_this_machines(
    folder: Path, monkeypatch: pytest.MonkeyPatch, wrong_s: float
) -> None:
    """The folder may lie on a server, or be written by machines, whose clocks differ from ours."""
    half = first_cell(folder) / ".attempt.abc.tmp"
    half.write_bytes(b"half")
    now_s = time.time()
    monkeypatch.setattr(time, "time", lambda: now_s + wrong_s)
    assert leftovers(folder) == [], "somebody writes it just now"
    age(half)
    assert [leftover.path for leftover in leftovers(folder)] == [half]


def test_leftovers_are_listed_first_and_removed_on_request(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = next(iter(cells()))
    cell = first_cell(folder)
    PartialStore(folder, key).commit(0, {})
    old, fresh = cell / ".record.json.1.tmp", cell / ".record.json.2.tmp"
    old.write_text("x" * 2048)
    fresh.write_text("x")
    age(old)
    (folder / "claims" / f"{'a' * 16}.1").write_bytes(b"damaged")
    age(folder / "claims" / f"{'a' * 16}.1")
    before = sorted(folder.rglob("*"))
    text = printed(capsys, "gc", folder)
    assert sorted(folder.rglob("*")) == before
    assert text.splitlines()[-1].startswith("3 leftovers, ")
    assert text.count("would remove") == 3
    assert printed(capsys, "gc", folder, "--delete").count("removed ") == 3
    assert not old.exists()
    assert fresh.exists(), "a live writer may be at it"
    assert not (cell / "batches").exists()
    assert leftovers(folder) == []
    assert verify(folder).num_records == 24


def test_what_is_in_use_is_no_leftover(tmp_path: Path) -> None:
    key = make_body(1)["key"]
    RecordStore(tmp_path).commit(make_body(1))
    claim = Claims(tmp_path).take(key)
    assert claim is not None
    PartialStore(tmp_path, key).commit(0, {})
    PartialStore(tmp_path, make_body(2)["key"]).commit(0, {})
    assert leftovers(tmp_path) == [], "a forced run is at the first cell; the second one has no record yet"
    claim.release()
    assert [leftover.path.name for leftover in leftovers(tmp_path)] == ["batches"]


def test_names_of_models_cannot_run_anything_in_a_terminal_or_a_spreadsheet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = {"model": "m", "dataset": "d", "policy": "=cmd|'/C calc'!A0", "budget": "b", "positions": "original"}
    RecordStore(tmp_path).commit(make_body(labels=labels, sweep="\x1b[31mred"))
    assert "\x1b" not in printed(capsys, "list", tmp_path)
    assert ",'=cmd" in printed(capsys, "csv", tmp_path)


@pytest.mark.long
def test_the_results_commands_import_no_torch(finished: Path) -> None:
    code = (
        "import sys\nfrom kvbench.cli.main import run\n"
        "for words in (['list'], ['csv'], ['verify'], ['gc'], ['table']):\n"
        "    assert run(['results', *words, sys.argv[1]]) == 0\n"
        "print(sorted({'torch', 'transformers', 'hydra', 'wandb'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, str(finished)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("words", [["--help"], ["gc", "--help"], ["csv", "--help"]])
def test_help_is_printed(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(["results", *words])
    assert ended.value.code == 0
    assert "usage: kvbench results" in capsys.readouterr().out
