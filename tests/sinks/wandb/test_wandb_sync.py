"""`kvbench wandb sync` on a folder of records: offline runs read back, online ones counted by a server."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from kvbench.autopsy.replay import glances
from kvbench.cli.main import run
from kvbench.datasets.scenes import Scenes
from kvbench.results.record import read_record, write_autopsy
from kvbench.sinks.wandb import sync as wandb_sync
from kvbench.sinks.wandb.content import cell_digest, summary_digest, summary_id
from kvbench.sinks.wandb.run import Place, is_sent, note_sent
from kvbench.sinks.wandb.sync import Job, note_sweep, send_runs
from tests.autopsy.autopsies import autopsy_body
from tests.report.synthetic import body, write_cell
from tests.sinks.wandb.fault_server import FaultServer
from tests.sinks.wandb.test_wandb import _inspect
from tests.sinks.wandb.test_wandb_faults import environment_of

REPO = Path(__file__).parents[3]
BODIES = [
    body(policy=policy, budget=budget, num_samples=8, sweep="first")
    for policy, budget in (("full", None), ("h2o", 0.2), ("random", 0.2))
]
pytestmark = pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of three cells, pictures beside the first, and a single cell; copy it before writing into it."""
    folder = tmp_path_factory.mktemp("records")
    first, *_ = [
        write_cell(folder, one) for one in [*BODIES, body(policy="h2o", budget=0.5, num_samples=4, sweep="single")]
    ]
    scenes = glances(Scenes(num_samples=8).examples())
    shown = [scene | {"id": sample["id"]} for scene, sample in zip(scenes, BODIES[0]["samples"], strict=True)]
    write_autopsy(first.with_name("autopsy.json"), autopsy_body(BODIES[0]["key"]) | {"glances": shown})
    return folder


def digests_of(folder: Path) -> dict[str, str]:
    files = [path for path in (folder / "cells").rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def offline(records: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of wandb's files after one offline sync of `records`."""
    to = tmp_path_factory.mktemp("to")
    before = digests_of(records)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("WANDB_MODE", raising=False)
        assert run(["wandb", "sync", str(records), "--mode", "offline", "--to", str(to)]) == 0
    assert digests_of(records) == before
    assert sorted(path.name for path in records.iterdir()) == ["cells"], "all of wandb's files go to --to"
    return to


def run_folder(offline: Path, run_id: str) -> Path:
    (folder,) = (offline / "wandb").glob(f"offline-run-*-{run_id}")
    return folder


@pytest.fixture(scope="module")
def summary(offline: Path) -> dict[str, Any]:
    found: dict[str, Any] = _inspect(run_folder(offline, summary_id("first", [b["key"] for b in BODIES])), "--summary")
    return found


def shown_table(offline: Path, summary: dict[str, Any], name: str) -> list[dict[str, Any]]:
    (path,) = (offline / "wandb").glob(f"offline-run-*/files/{summary['summary'][name]['path']}")
    content = json.loads(path.read_text())
    return [dict(zip(content["columns"], row, strict=True)) for row in content["data"]]


@pytest.mark.few(1)
def test_a_cell_is_one_run_with_nested_settings_that_can_be_grouped_by(offline: Path) -> None:
    seen = _inspect(run_folder(offline, BODIES[1]["key"][:16]), "--summary")
    config = seen["config"]
    assert (config["policy"]["name"], config["model"]["name"], config["dataset"]["name"]) == (
        *("h2o", "tiny-llava", "scenes"),
    )
    assert config["budget"] == {"name": "20 % tokens kept", "fraction": 0.2, "tokens": None}
    assert (config["key"], config["sweep"], config["positions"]) == (BODIES[1]["key"], "first", "original")
    assert len(list((offline / "wandb").glob("offline-run-*"))) == 5, "four cells, and a summary of the one sweep"


def test_the_summary_says_how_each_cell_compares_to_the_full_cache(summary: dict[str, Any]) -> None:
    numbers, start = summary["summary"], "to_full/h2o@20 % tokens kept/"
    assert numbers[f"{start}quality/rougeL_vs_full_verdict"] == "worse"
    low, value, high = (numbers[f"{start}quality/ppl{end}"] for end in ("_low", "", "_high"))
    assert 0 < low < value < high
    assert numbers[f"{start}latency/tpot_ratio_to_full_verdict"] in ("better", "equivalent", "undecided")
    assert not [name for name in numbers if name.startswith("to_full/full")]


def test_the_summary_run_shows_every_cell_and_verdict_and_the_best_policy(
    offline: Path, summary: dict[str, Any]
) -> None:
    assert (summary["name"], summary["tags"]) == ("summary of first", ["summary"])
    assert summary["config"]["policies"] == ["full", "h2o", "random"]
    assert summary["summary"]["num_cells/ok"] == 3
    cells = shown_table(offline, summary, "cells")
    assert [row["policy"] for row in cells] == ["full", "h2o", "random"]
    ppl = BODIES[1]["measurements"]["ppl"]
    assert (cells[1]["quality/ppl"], cells[1]["quality/ppl_low"]) == (ppl["value"], ppl["low"])
    verdicts = shown_table(offline, summary, "verdicts")
    pairs = {(row["policy"], row["against"]) for row in verdicts}
    assert pairs == {("h2o", "full"), ("random", "full"), ("h2o", "random")}
    board = shown_table(offline, summary, "leaderboard")
    assert [(row["rank"], row["policy"], row["against the next"]) for row in board] == [
        *((None, "full", "reference"), (1, "h2o", "better"), (2, "random", "")),
    ]
    failing = shown_table(offline, summary, "failing")
    assert {row["policy"] for row in failing} <= {"h2o", "random"}
    assert failing[0]["answer"] != failing[0]["full cache"]
    best = {row["measure"]: row for row in shown_table(offline, summary, "best")}
    assert (best["PPL"]["policy"], best["PPL"]["next policy"]) == ("h2o", "random")
    assert best["PPL"]["verdict against it"] == "better"
    figures = [name for name in summary["summary"] if name.startswith("figures/")]
    assert len(figures) >= 4
    for name in figures:
        shown = summary["summary"][name]
        assert (shown["_type"], shown["format"]) == ("image-file", "png")
        assert shown["caption"].startswith("tiny-llava on scenes: ")


def test_the_summary_shows_the_pictures_that_fail_with_what_was_asked_and_under_whom(
    offline: Path, summary: dict[str, Any]
) -> None:
    failing = [row for row in shown_table(offline, summary, "failing") if row["budget"] == "20 % tokens kept"]
    assert all(row["question"] for row in failing), "asked of the picture, though no record says it"
    shown = summary["summary"]["failing_pictures"]
    assert (shown["_type"], shown["count"]) == ("images/separated", len(shown["captions"]))
    assert 0 < shown["count"] <= 8
    told = {row["sample"]: row["question"] for row in failing}
    for caption in shown["captions"]:
        start, _, rest = caption.partition(": fails at 20 % tokens kept under ")
        sample = start.removeprefix("tiny-llava on scenes, ")
        assert rest.startswith(("h2o", "random"))
        if sample in told:
            assert rest.endswith(told[sample])
    files = [next((offline / "wandb").glob(f"offline-run-*/files/{name}")) for name in shown["filenames"]]
    assert all(Image.open(file).size[0] > 8 for file in files)


def test_the_records_are_an_artifact_whose_digest_is_that_of_the_files(offline: Path, records: Path) -> None:
    folder = run_folder(offline, summary_id("first", [b["key"] for b in BODIES]))
    sent = [line["artifact"] for line in _inspect(folder) if line["type"] == "artifact"]
    (artifact,) = (one for one in sent if one["type"] == "kvbench-records")
    files = {entry["path"]: entry for entry in artifact["manifest"]["contents"]}
    assert set(files) == {f"cells/{b['key'][:16]}/record.json" for b in BODIES}
    for name, entry in files.items():
        assert Path(entry["local_path"]) == records / name, "no copy in wandb's own folders"
        assert base64.b64decode(entry["digest"]) == hashlib.md5((records / name).read_bytes()).digest()


def test_a_second_offline_sync_sends_nothing_until_a_run_is_gone(
    offline: Path, records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to = tmp_path / "to"
    subprocess.run(["cp", "-a", str(offline), str(to)], check=True)
    command = ["wandb", "sync", str(records), "--mode", "offline", "--to", str(to)]
    before = sorted((to / "wandb").glob("offline-run-*"))
    assert run(command) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "wandb: 5 there already"
    assert f"wandb sync {to}/wandb/offline-run-*" in printed[1]
    assert sorted((to / "wandb").glob("offline-run-*")) == before
    shutil.rmtree(run_folder(to, BODIES[1]["key"][:16]))
    assert run(command) == 0
    assert capsys.readouterr().out.startswith("wandb: 1 cell kept offline (as asked) in ")
    assert run_folder(to, BODIES[1]["key"][:16]).is_dir()


def test_what_was_sent_is_noted_per_target_and_content_and_a_damaged_note_does_not_count(tmp_path: Path) -> None:
    note_sent(tmp_path, "online\nhost\n\nkvbench", "abc", "d1")
    note_sent(tmp_path, "online\nhost\n\nkvbench", "abc", "d1")
    assert is_sent(tmp_path, "online\nhost\n\nkvbench", "abc", "d1")
    for target, run_id, digest in (("offline", "abc", "d1"), ("online\nhost\n\nkvbench", "abd", "d1")):
        assert not is_sent(tmp_path, target, run_id, digest)
    assert not is_sent(tmp_path, "online\nhost\n\nkvbench", "abc", "d2")
    (note,) = (tmp_path / "wandb" / "sent").iterdir()
    note.write_bytes(note.read_bytes().replace(b'"abc"', b'"abx"'))
    assert not is_sent(tmp_path, "online\nhost\n\nkvbench", "abc", "d1")
    note_sent(tmp_path, "online\nhost\n\nkvbench", "abc", "d1")
    assert is_sent(tmp_path, "online\nhost\n\nkvbench", "abc", "d1")


def test_the_id_of_a_summary_comes_from_name_and_keys_and_its_digest_from_content() -> None:
    keys = [one["key"] for one in BODIES]
    assert summary_id("first", keys) == summary_id("first", keys[::-1])
    assert len({summary_id("first", keys), summary_id("second", keys), summary_id("first", keys[1:])}) == 3
    digests = [cell_digest(one) for one in BODIES]
    again = [cell_digest({**BODIES[0], "attempt": "0" * 32}), *digests[1:]]
    assert summary_digest(digests, "1") == summary_digest(digests[::-1], "1")
    assert len({summary_digest(digests, "1"), summary_digest(again, "1"), summary_digest(digests, "2")}) == 3


_SYNCS = """
import shutil, sys
from pathlib import Path
from kvbench.cli.main import run
folder = Path(sys.argv[1])
def sync(*words):
    print("code", run(["wandb", "sync", str(folder), "--mode", "online", "--timeout", "20", *words]), flush=True)
sync()
sync()
(next((folder / "wandb" / "sent").glob(sys.argv[2] + "-*"))).write_text("damaged")
sync("--sweep", "first")
shutil.rmtree(folder / "wandb")
sync("--sweep", "first")
"""


def test_a_sweep_that_used_cells_of_another_keeps_the_summary_it_had_live(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr("kvbench.report.figures.draw.draw_pngs", lambda results: [])
    folder = tmp_path / "results"
    reused, own, more = (body(policy=policy, num_samples=4, sweep=sweep, budget=budget) for policy, sweep, budget in
                         (("full", "before", None), ("h2o", "mine", 0.2), ("random", "mine", 0.2)))  # fmt: skip
    for one in (reused, own, more):
        write_cell(folder, one)
    keys = [one["key"] for one in (reused, own, more)]
    note_sweep(folder, summary_id("mine", keys), "mine", keys)
    note_sweep(folder, "f" * 16, "mine", [*keys, "e" * 64])  # one of its cells is gone
    (folder / "wandb" / "sweeps" / "torn.json").write_text("{")
    assert run(["wandb", "sync", str(folder), "--mode", "offline", "--sweep", "mine"]) == 0
    sent = {path.name.rpartition("-")[2] for path in (folder / "wandb").glob("offline-run-*")}
    assert sent == {own["key"][:16], more["key"][:16], summary_id("mine", keys)}


def test_runs_that_the_server_refuses_at_once_do_not_hold_up_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def write(spec: str, place: Place, mode: str) -> None:
        tried.append(spec)
        if spec in "abc":
            raise RuntimeError("this run was deleted")

    monkeypatch.setattr(wandb_sync, "write_run", write)
    monkeypatch.setattr(wandb_sync, "restart_service", lambda timeout_s: None)
    monkeypatch.setattr(Place, "has", lambda *words: False)
    jobs = [Job(id=name, digest="", what="cell", make=lambda name=name: name) for name in "abcde"]  # type: ignore[misc]
    outcome = send_runs(jobs, Place(project="p", entity=None, folder=Path(), timeout_s=5.0), "online", lambda: None)
    assert (tried, outcome.sent, len(outcome.failures), outcome.num_left) == (list("abcde"), {"cell": 2}, 3, 0)


def test_two_runs_that_end_by_their_time_limit_stop_a_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    def write(spec: str, place: Place, mode: str) -> None:
        time.sleep(place.timeout_s)
        raise TimeoutError("nobody answers")

    monkeypatch.setattr(wandb_sync, "write_run", write)
    monkeypatch.setattr(wandb_sync, "restart_service", lambda timeout_s: None)
    monkeypatch.setattr(Place, "has", lambda *words: False)
    jobs = [Job(id=name, digest="", what="cell", make=lambda: None) for name in "abcde"]  # type: ignore[arg-type, return-value]
    outcome = send_runs(jobs, Place(project="p", entity=None, folder=Path(), timeout_s=0.05), "online", lambda: None)
    assert (len(outcome.failures), outcome.num_left) == (2, 3)


@pytest.mark.long
def test_online_each_cell_is_sent_once_and_a_second_upload_lands_on_the_same_runs(
    records: Path, tmp_path: Path
) -> None:
    """Sent, nothing new, one whose note is damaged, and all again without any note."""
    folder, server = tmp_path / "results", FaultServer("none")
    subprocess.run(["cp", "-a", str(records), str(folder)], check=True)
    first = BODIES[0]["key"][:16]
    secret = "canary-sent-77aa52"
    hidden = body(policy="elastic", budget=0.2, num_samples=4, sweep="first")
    hidden["samples"][0]["text"] = secret
    write_cell(folder, hidden)
    before = digests_of(folder)
    try:
        environment = {**environment_of("none", server.port), "MY_SERVICE_TOKEN": secret}
        command = [sys.executable, "-c", _SYNCS, str(folder), first]
        done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=200)
    finally:
        server.close()
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    address = f"sent to http://127.0.0.1:{server.port} kvbench"
    assert lines == [
        *(f"wandb: 5 cells and 1 summary {address}", "code 0", "wandb: 6 there already", "code 0"),
        *(f"wandb: 1 cell {address}; 4 there already", "code 0", f"wandb: 4 cells and 1 summary {address}", "code 0"),
    ]
    swept = {one["key"][:16] for one in [*BODIES, hidden]}
    overall = summary_id("first", [one["key"] for one in [*BODIES, hidden]])
    assert {run_id: count for run_id, count in server.runs.items() if count > 1} == {
        run_id: 3 if run_id == first else 2 for run_id in (*swept, overall)
    }
    assert len(server.runs) == 6, "no run besides the five cells and the summary"
    for name, sent in server.artifacts.items():
        assert len(set(sent)) == 1, f"the same content made a new version of {name}"
    assert any(name.startswith("records-first-") for name in server.artifacts)
    assert len(server.artifacts) == 5 + 5 + 1, "samples of five cells, five tables, the records"
    _check_files(server.files, overall)
    assert digests_of(folder) == before, "records are only read"
    assert secret.encode() not in server.received
    assert read_record(folder / "cells" / hidden["key"][:16] / "record.json")["samples"][0]["text"] == secret
    clean = read_record(folder / "wandb" / "redacted" / f"{hidden['key'][:16]}.json")
    assert clean["samples"][0]["text"] == "***"


def _check_files(files: dict[str, list[bytes]], summary: str) -> None:
    """Figures and tables of the summary arrived whole, twice as it was sent twice, with the same bytes."""
    sent = {name.rpartition("/")[2]: content for name, content in files.items() if name.startswith(f"{summary}/media/")}
    figures = [content for name, content in sent.items() if name.endswith(".png")]
    tables = {name.partition("_")[0]: content for name, content in sent.items() if name.endswith(".table.json")}
    assert len(figures) >= 4
    assert set(tables) == {"best", "cells", "failing", "leaderboard", "verdicts"}
    assert len(json.loads(tables["cells"][0])["data"]) == 4
    for content in [*figures, *tables.values()]:
        assert len(content) == 2
        assert content[0] == content[1]
    assert all(content[0].startswith(b"\x89PNG") for content in figures)


@pytest.mark.long
@pytest.mark.timeout(200)
def test_a_sync_that_the_server_refuses_says_so_and_goes_on_later(tmp_path: Path) -> None:
    folder, server = tmp_path / "results", FaultServer("none")
    server.refuse_after = 2
    for name in "abcde":
        write_cell(folder, body(num_samples=4, sweep=name))
    command = [sys.executable, "-m", "kvbench", "wandb", "sync", str(folder), "--mode", "online", "--timeout", "8"]
    try:
        environment = environment_of("none", server.port)
        told = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=120)
        assert told.returncode == 1
        assert "Traceback" not in told.stderr
        lines = told.stdout.splitlines()
        assert lines[0].startswith("wandb: 2 cells sent to")
        assert [line.split(":")[1] for line in lines[1:4]] == [" failed"] * 3
        assert lines[4:] == ["wandb: 3 failed, 0 not tried; the same command goes on with them"]
        server.refuse_after = None
        told = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=120)
    finally:
        server.close()
    assert (told.returncode, told.stderr) == (0, "")
    assert told.stdout.startswith("wandb: 3 cells sent to")
    assert told.stdout.endswith("; 2 there already\n")
    assert len(server.runs) == 5
    assert set(server.runs.values()) == {1}


def test_a_damaged_and_a_moved_record_are_named_and_the_others_sent(
    records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "results"
    subprocess.run(["cp", "-a", str(records), str(folder)], check=True)
    damaged, moved = (folder / "cells" / one["key"][:16] for one in BODIES[:2])
    (damaged / "record.json").write_bytes(b"{}")
    moved.rename(moved.with_name("0" * 16))
    assert run(["wandb", "sync", str(folder), "--mode", "offline"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[1].strip().split("/")[1] for line in lines[:2]] == ["0" * 16, damaged.name]
    assert lines[2].startswith("wandb: 2 cells kept offline"), "and no summary of a sweep of which one cell is left"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sync", "FOLDER", "--mode", "ofline"], "--mode is 'ofline'; did you mean 'offline' or 'online'?"),
        (["sync", "FOLDER", "--mode", "disabled"], "--mode is 'disabled'; "),
        (["sync", "FOLDER", "--mode", "online"], "--mode is 'online', but no API key was found; run `wandb login`"),
        (["sync", "FOLDER", "--project", "a/b"], "--project is 'a/b'; it must have 1 to 128 letters and none of / "),
        (["sync", "FOLDER", "--timeout", "0"], "--timeout is 0; it must lie in (0, 600] seconds"),
        (["sync", "FOLDER", "--sweep", "fist"], "no record belongs to the sweep 'fist'; did you mean 'first'?"),
        (["sync", "nowhere"], "the results folder nowhere does not exist"),
        (["sink"], "the command is 'sink'; known: sync"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str],
    message: str,
    records: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    assert run(["wandb", *(str(records) if word == "FOLDER" else word for word in words)]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.count("\n") == 1
    assert message in told.err
    assert sorted(path.name for path in records.iterdir()) == ["cells"]


def test_without_the_package_the_command_says_how_to_install_it(
    records: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvbench.sinks.wandb.run.importlib.util.find_spec", lambda name: None)
    assert run(["wandb", "sync", str(records)]) == 2
    assert "wandb is not installed; python -m pip install wandb" in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.cover("one")
@pytest.mark.parametrize(("name", "value"), [("WANDB_MODE", "onlin"), ("WANDB_MODE", ""), ("WANDB_BASE_URL", "here")])
def test_a_variable_that_wandb_does_not_know_is_one_line(name: str, value: str, records: Path) -> None:
    """In a process of its own: wandb reads the environment once."""
    command = [sys.executable, "-m", "kvbench", "wandb", "sync", str(records)]
    told = subprocess.run(command, env={**os.environ, name: value}, capture_output=True, text=True, timeout=120)
    assert (told.returncode, told.stdout, told.stderr.count("\n")) == (2, "", 1)
    assert f"{name} is {value!r} in the environment; it must be " in told.stderr
    assert sorted(path.name for path in records.iterdir()) == ["cells"]
