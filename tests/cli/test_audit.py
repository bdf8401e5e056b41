"""`kvbench audit` as it is called: exit codes, files, table, badge."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from kvbench.audit import KIND, VERSION
from kvbench.cli.main import run
from kvbench.results.files import unseal
from tests.audit.doctored import over_budget_at_one_step
from tests.audit.folders import honest, write_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "results", list(honest().values()))


@pytest.fixture
def doctored(tmp_path: Path) -> Path:
    bodies = honest()
    over_budget_at_one_step(bodies)
    return write_folder(tmp_path / "doctored", list(bodies.values()))


def test_a_folder_that_holds_together_gives_zero_and_says_what_was_not_run(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["audit", str(folder)]) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["A1", "A2", "A3", "A4"]
    assert "(not run: needs the model)" in lines[0]
    assert lines[2].startswith("A3  passed")
    assert "20 passed, 2 not run; 5 cells" in printed
    key = honest()["h2o 0.2"]["key"][:8]
    assert f"A4 {key} h2o, 20 % tokens kept: answers of 59 % of the full cache's length: outside of 10 %" in printed
    assert f"[![kvbench audit: 20 passed, 2 not run]({folder}/audit.svg)]({folder}/audit.json)" in printed


def test_a_failed_check_gives_one_names_the_cell_and_what_it_means(
    doctored: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["audit", str(doctored)]) == 1
    lines = capsys.readouterr().out.splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("A7  failed"))
    assert "h2o, 20 % tokens kept: after 163 tokens it holds 33 entries, the budget allows 32" in lines[at + 1]
    assert lines[at + 2].strip() == "means: the policy held more entries than it says"
    assert "1 failed (A7), 19 passed, 2 not run; 5 cells" in "\n".join(lines)
    assert ">1 failed, 19 passed, 2 not run</text>" in (doctored / "audit.svg").read_text()


def test_what_had_nothing_to_look_at_is_not_counted_as_passed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = {name: body for name, body in honest().items() if name == "full"}
    assert len(alone) == 1
    assert run(["audit", str(write_folder(tmp_path, list(alone.values())))]) == 0
    lines = capsys.readouterr().out.splitlines()
    verdicts = [line[4:19].strip() for line in lines if re.match(r"[AR]\d+ ", line)]
    counted = {verdict: verdicts.count(verdict) for verdict in set(verdicts)}
    assert counted["not applicable"] > 0
    assert sum(counted.values()) == 22
    told = (
        f"{counted['passed']} passed, {counted['not run']} not run, {counted['not applicable']} not applicable; 1 cell,"
    )
    assert any(line.startswith(told) for line in lines)


def test_the_json_is_sealed_and_the_same_bytes_each_time(folder: Path, tmp_path: Path) -> None:
    assert run(["audit", str(folder)]) == 0
    first = [(folder / f"audit.{kind}").read_bytes() for kind in ("json", "svg")]
    assert run(["audit", str(folder), "--out", str(tmp_path / "again.json")]) == 0
    assert [(tmp_path / f"again.{kind}").read_bytes() for kind in ("json", "svg")] == first
    body = unseal(folder / "audit.json", KIND, VERSION, "")
    assert body["passed"] is True
    assert body["num_cells"] == 5
    assert {check["verdict"] for check in body["checks"]} == {"passed", "not run"}
    assert body["counts"] == {"failed": 0, "passed": 20, "not run": 2, "not applicable": 0}
    ElementTree.fromstring((folder / "audit.svg").read_text())


def test_the_folder_to_write_to_is_made(folder: Path, tmp_path: Path) -> None:
    assert run(["audit", str(folder), "--out", str(tmp_path / "a" / "b.json")]) == 0
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["b.json", "b.svg"]


def test_the_digest_follows_the_records(folder: Path, doctored: Path) -> None:
    run(["audit", str(folder)])
    run(["audit", str(doctored)])
    digests = {unseal(path / "audit.json", KIND, VERSION, "")["digest"] for path in (folder, doctored)}
    assert len(digests) == 2


def test_json_goes_to_the_terminal_when_asked_for(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["audit", str(folder), "--json", "--sweep", "small"]) == 0
    assert json.loads(capsys.readouterr().out)["sweep"] == "small"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "the results folder nowhere does not exist"),
        (["{folder}", "--sweep", "smal"], "no record belongs to the sweep 'smal'; did you mean 'small'?"),
        (["{folder}", "--out", "audit.txt"], "--out is 'audit.txt'; its name must end in .json"),
        (["{folder}", "--out", "{folder}/a-file/a.json"], "a-file/a.json: File exists; choose another --out"),
        (["{folder}/cells"], "has no records below cells"),
        (["{folder}", "--strict"], "unrecognized arguments: --strict; kvbench audit --help lists flags"),
    ],
)
def test_a_wrong_command_line_is_told_in_one_line(
    folder: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "a-file").touch()
    assert run(["audit", *(word.format(folder=folder) for word in words)]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert said in printed


def test_control_characters_of_a_record_do_not_reach_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bodies = honest()
    bodies["h2o 0.2"]["labels"]["policy"] = "\x1b[2Jgone"
    run(["audit", str(write_folder(tmp_path, list(bodies.values())))])
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "?[2Jgone" in printed


@pytest.mark.long
def test_it_needs_neither_torch_nor_hydra(folder: Path) -> None:
    code = (
        "import sys; from kvbench.cli.main import run; code = run(['audit', sys.argv[1]]); "
        "sys.exit(code or bool({'torch', 'transformers', 'hydra', 'wandb', 'matplotlib', 'pandas'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, str(folder)]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
