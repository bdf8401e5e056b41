"""`kvbench report`: what it writes where, and how it answers wrong input."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from kvbench.cli.main import run
from tests.report.synthetic import body, write_cell


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for policy, budget in (("full", None), ("h2o", 0.2), ("random", 0.2)):
        write_cell(tmp_path / "results", body(policy=policy, budget=budget))
    return tmp_path / "results"


def test_the_page_of_one_folder_lies_in_it(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvbench.report.build.draw_plots", lambda results: ())
    assert run(["report", str(folder)]) == 0
    assert f"report: {folder / 'report' / 'index.html'}" in capsys.readouterr().out
    assert (folder / "report" / "index.html").is_file()
    assert (folder / "table.csv").is_file()


def test_several_folders_give_one_page_where_out_says(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvbench.report.build.draw_plots", lambda results: ())
    write_cell(tmp_path / "other", body(policy="elastic"))
    assert run(["report", str(folder), str(tmp_path / "other"), "--out", str(tmp_path / "both")]) == 0
    page = (tmp_path / "both" / "index.html").read_text(encoding="utf-8")
    assert "1 from <code>other</code>" in page
    assert (tmp_path / "both" / "table.csv").is_file()
    assert not (folder / "report").exists()


@pytest.mark.parametrize("out", [[], ["--out", "elsewhere"]])
def test_the_page_links_the_tables_wherever_it_lies(
    folder: Path, out: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("kvbench.report.build.draw_plots", lambda results: ())
    assert run(["report", str(folder), *out]) == 0
    page = Path(out[1] if out else folder / "report") / "index.html"
    links = set(re.findall(r'href="([^"#]*/?[a-z_]+\.(?:csv|parquet))"', page.read_text()))
    assert {Path(link).name for link in links} >= {"table.csv", "table_long.csv", "samples.parquet"}
    assert all((page.parent / link).is_file() for link in links)


@pytest.mark.parametrize(("name", "start"), [("md", "## "), ("csv", "model,"), ("latex", "% Made by")])
def test_other_formats_go_to_the_terminal_or_a_file(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, start: str
) -> None:
    assert run(["report", str(folder), "--format", name]) == 0
    text = capsys.readouterr().out
    assert text.startswith(start)
    out = tmp_path / "new" / "table.txt"
    assert run(["report", str(folder), "--format", name, "--out", str(out)]) == 0
    assert out.read_text(encoding="utf-8") == text
    assert not (folder / "report").exists()


@pytest.mark.parametrize("words", [["report", "--format", "md"], ["results", "csv"]])
def test_a_table_in_a_pipe_tells_beside_itself_what_is_missing_from_it(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    torn = next(folder.glob("cells/*/record.json"))
    torn.unlink()
    torn.write_text("{")
    assert run([*words, str(folder)]) == 0
    printed = capsys.readouterr()
    assert "problem" not in printed.out
    assert printed.err.startswith(f"problem: cells/{torn.parent.name}/record.json: is torn")


def test_a_folder_without_records_is_a_mistake_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["report", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert "there is no cells/*/record.json" in printed.err
    assert not list(tmp_path.iterdir())


def test_a_margin_changes_the_verdict_and_is_printed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["report", str(folder), "--format", "md", "--margin", "objects_recalled=0.9"]) == 0
    text = capsys.readouterr().out
    assert "Margin: 90.0 points" in text
    assert "equivalent (within 90.0 points)" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--format", "pdf"], "--format"),
        (["--margin", "rougeL_vs_flul=0.1"], "rougeL_vs_full"),
        (["--margin", "ppl=-1"], "above 0"),
        (["--format", "csv", "--out", "."], "must be a file"),
        (["--sweep", "nothing"], "no record belongs"),
        (["--fromat", "csv"], "--fromat"),
    ],
)
def test_wrong_words_are_one_line_and_exit_code_2(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert run(["report", str(folder), *words]) == 2
    seen = capsys.readouterr()
    assert said in seen.err
    assert seen.err.count("\n") == 1
    assert seen.out == ""


def test_a_file_where_the_page_should_go_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "page").write_text("mine")
    assert run(["report", str(folder), "--out", str(tmp_path / "page")]) == 2
    assert (tmp_path / "page").read_text() == "mine"


@pytest.mark.long
def test_help_and_csv_need_no_matplotlib(folder: Path) -> None:
    code = (
        "import sys; from kvbench.cli.main import run; run(['report', sys.argv[1], '--format', 'csv']);"
        " sys.exit(bool({'matplotlib', 'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True).returncode == 0
