"""`kvbench diff`: what changed between two folders, and when a merge gate closes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvbench.cli.main import run
from kvbench.report.compare import Comparison
from kvbench.report.diff import is_beyond
from kvbench.report.load import load_results
from kvbench.stats.tests import holm
from tests.report.synthetic import body, write_cell

RECALLED = "objects_recalled_fraction"
CELLS = (("full", None), ("h2o", 0.2), ("h2o", 0.5), ("elastic", 0.2))


def write(folder: Path, change: Callable[[dict[str, Any]], object] = lambda record: None, **words: Any) -> Path:
    for policy, budget in CELLS:
        record = body(policy=policy, budget=budget, **words)
        change(record)
        write_cell(folder, record)
    return folder


def is_h2o(record: dict[str, Any], budget: float = 0.2) -> bool:
    return (record["labels"]["policy"], record["labels"]["budget_fraction"]) == ("h2o", budget)


def shifted(by: float, name: str = RECALLED) -> Callable[[dict[str, Any]], None]:
    """Make h2o at 20 % score less in every sample, on average `by`, as another run of another version."""

    def change(record: dict[str, Any]) -> None:
        record["started_utc"] = "2026-12-01T00:00:00+00:00"
        if is_h2o(record):
            for index, sample in enumerate(record["samples"]):
                sample[name] = 0.5 + (sample[name] - 0.5) / 4 - by * (0.8 + 0.4 * index / 31)
            record["measurements"][name]["value"] -= by

    return change


@pytest.fixture
def before(tmp_path: Path) -> Path:
    return write(tmp_path / "before", shifted(0.0))


def printed(capsys: pytest.CaptureFixture[str], *words: object, code: int) -> str:
    assert run(["diff", *map(str, words)]) == code
    return capsys.readouterr().out


def told(capsys: pytest.CaptureFixture[str], *words: object, code: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(printed(capsys, *words, "--format", "json", code=code))
    return found


def test_a_folder_beside_itself_is_unchanged(before: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, before, before, code=0)
    assert "4 cells in both (4 with the same key), 0 only in A, 0 only in B" in text
    assert "settings: the same\nenvironment: the same\nverdicts (B minus A): " in text
    assert " unchanged\n" in text
    assert text.endswith("nothing is shown to be worse beyond its margin\n")


def test_a_cell_that_became_worse_closes_the_gate_and_is_told_first_with_its_samples(
    before: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    after = write(tmp_path / "after", shifted(0.3), sweep="other")
    lines = printed(capsys, before, after, "--samples", 3, code=1).splitlines()
    assert "4 cells in both (0 with the same key), 0 only in A, 0 only in B" in lines
    at = next(number for number, line in enumerate(lines) if line.startswith("verdicts"))
    assert " objects recalled " in lines[at + 1]
    assert lines[at + 1].startswith("  worse ")
    assert "h2o, 20 % tokens kept" in lines[at + 1]
    assert re.search(r" -30\.0 \[-3\d\.\d, -2\d\.\d\] points ", lines[at + 1])
    assert "margin 2.0 points, 32 samples" in lines[at + 1]
    head = lines.index("  h2o, 20 % tokens kept: objects recalled worse in 32, better in 0, of 32")
    assert lines[head + 1].startswith("    scenes/test/")
    assert " -> " in lines[head + 3]
    assert len([line for line in lines if line.startswith("    scenes/test/")]) == 3
    assert lines[-1] == "worse: 1 worse beyond the margin"
    assert "better " in printed(capsys, after, before, code=0), "the other way round it is a gain"


def test_what_is_within_the_margin_leaves_the_gate_open_and_another_margin_closes_it(
    before: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    after = write(tmp_path / "after", shifted(0.01))
    found = told(capsys, before, after, code=0)
    (h2o,) = (cell for cell in found["cells"] if cell["cell"] == "h2o, 20 % tokens kept")
    (one,) = (one for one in h2o["comparisons"] if one["measure"] == RECALLED)
    assert (one["verdict"], one["num_samples"]) == ("equivalent", 32)
    assert one["value"] == pytest.approx(-0.01)
    closed = told(capsys, before, after, "--margin", "objects_recalled=0.005", code=1)
    assert closed["outcome"] == "worse: 1 worse beyond the margin"


def test_worse_by_less_than_the_margin_is_said_and_does_not_close_the_gate(before: Path) -> None:
    cell = load_results(before).records[1]
    words: dict[str, Any] = {"measure": RECALLED, "first": cell, "second": cell, "method": "", "margin": 0.02}
    assert is_beyond(Comparison(**words, value=-0.03, low=-0.05, high=-0.01, verdict="worse"))
    assert not is_beyond(Comparison(**words, value=-0.015, low=-0.025, high=-0.005, verdict="worse"))
    assert not is_beyond(Comparison(**words, value=-0.3, low=-0.9, high=0.3, verdict="undecided"))
    assert is_beyond(Comparison(**words | {"margin": None}, value=0.001, low=0.0005, high=0.002, verdict="worse"))


def test_one_correction_is_over_everything_that_is_compared(
    before: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    after = write(tmp_path / "after", seed=1)
    code = run(["diff", str(before), str(after)])
    assert capsys.readouterr().out
    found = told(capsys, before, after, code=code)
    tested = [one for cell in found["cells"] for one in cell["comparisons"] if one["p_value"] is not None]
    assert len({one["measure"] for one in tested}) > 3
    assert [one["p_holm"] for one in tested] == pytest.approx(holm([one["p_value"] for one in tested]))


def test_a_cell_that_fails_now_closes_the_gate(
    before: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    after = write(tmp_path / "after")
    write_cell(after, body(policy="snapkv"))
    other = tmp_path / "other"
    for path in before.rglob("record.json"):
        (other / path.relative_to(before)).parent.mkdir(parents=True)
        (other / path.relative_to(before)).write_bytes(path.read_bytes())
    write_cell(other, body(policy="snapkv", status="oom", sweep="second"))
    text = printed(capsys, after, other, code=1)
    assert "  fails now: snapkv, 20 % tokens kept: oom: OutOfMemoryError: tried to allocate" in text
    assert text.endswith("worse: 1 that fail now\n")
    assert "fails now" in printed(capsys, after, other, "--format", "markdown", code=1)
    assert "fails now" not in printed(capsys, other, after, code=0)


def test_cells_settings_and_environment_that_differ_are_listed(
    before: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def newer(record: dict[str, Any]) -> None:
        shifted(0.0)(record)
        record["cell"]["policy"]["source"] = "new"
        record["environment"]["torch"] = "2.14.0"

    after = write(tmp_path / "after", newer)
    write_cell(after, body(policy="random"))
    write_cell(before, body(policy="streaming_llm"))
    text = printed(capsys, before, after, code=0)
    assert "  only in A: streaming_llm, 20 % tokens kept\n" in text
    assert "  only in B: random, 20 % tokens kept\n" in text
    assert "settings: 1 change\n  policy.source: - -> new (4 cells)\n" in text
    assert "environment: 1 change\n  torch: 2.13.0 -> 2.14.0 (4 cells)\n" in text


def test_times_of_another_machine_are_not_compared_and_answers_are(
    before: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def elsewhere(record: dict[str, Any]) -> None:
        shifted(0.3)(record)
        record["environment"]["num_threads"] = 64

    after = write(tmp_path / "after", elsewhere, sweep="other")
    found = told(capsys, before, after, code=1)
    times = [one for cell in found["cells"] for one in cell["comparisons"] if "ratio" in one["measure"]]
    assert len(times) == 2 * 3, "the full cache has none"
    assert {(one["verdict"], one["reason"]) for one in times} == {("not comparable", "measured on another machine")}
    assert "worse  " in printed(capsys, before, after, code=1)


def test_the_samples_that_both_have_are_compared_and_only_where_they_ask_the_same(
    before: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fewer(record: dict[str, Any]) -> None:
        shifted(0.3)(record)
        record["samples"] = record["samples"][8:]
        record["samples"][0]["reference"] = "another picture"

    found = told(capsys, before, write(tmp_path / "after", fewer), code=1)
    (h2o,) = (cell for cell in found["cells"] if cell["cell"] == "h2o, 20 % tokens kept")
    assert {one["num_samples"] for one in h2o["comparisons"] if one["measure"] == RECALLED} == {23}
    assert h2o["num_shared_samples"] == 23

    def renamed(record: dict[str, Any]) -> None:
        for sample in record["samples"]:
            sample["id"] += "-new"

    found = told(capsys, before, write(tmp_path / "renamed", renamed), code=0)
    reasons = {one["reason"] for cell in found["cells"] for one in cell["comparisons"] if one["measure"] == RECALLED}
    assert reasons == {"no sample in common"}, "never the two means beside each other"


def test_what_is_measured_no_more_is_told_and_nothing_in_common_opens_no_gate(
    before: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def less(record: dict[str, Any]) -> None:
        record["started_utc"] = "2026-12-02T00:00:00+00:00"
        del record["measurements"][RECALLED]

    after = write(tmp_path / "after", less)
    text = printed(capsys, before, after, code=0)
    assert len(re.findall(r"not comparable  .*objects recalled .*not measured in B\n", text)) == len(CELLS)
    assert run(["diff", str(before), str(after), "--measure", "objects_recalled"]) == 2
    assert "4 of which both have, and no number of them can be compared" in capsys.readouterr().err
    assert run(["diff", str(after), str(before), "--measure", "objects_recalled"]) == 2


def test_cells_of_equal_labels_are_paired_with_the_most_alike(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        for seed in (1, 2):
            record = body(seed=seed, sweep=name)
            record["started_utc"] = f"2026-12-0{seed}T00:00:00+00:00"
            write_cell(tmp_path / name, record)
    found = told(capsys, tmp_path / "a", tmp_path / "b", code=0)
    assert found["settings"] == []
    assert [len(cell["same"]) > 0 for cell in found["cells"]] == [True, True]


def test_the_page_of_a_report_stands_for_its_folder(before: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (before / "report").mkdir()
    (before / "report" / "index.html").write_text("<html>")
    whole = printed(capsys, before, before, code=0)
    for page in (before / "report" / "index.html", before / "report"):
        assert printed(capsys, page, before, code=0).splitlines()[1:] == whole.splitlines()[1:]


def test_markdown_has_the_outcome_first_and_every_row_of_a_table_as_many_columns(
    before: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    after = write(tmp_path / "after", shifted(0.3), sweep="other", model="a|b")
    before = write(tmp_path / "named", shifted(0.0), model="a|b")
    text = printed(capsys, before, after, "--format", "markdown", code=1)
    assert text.startswith("**worse: 1 worse beyond the margin**\n")
    assert re.search(r"\| h2o, 20 % tokens kept \| objects recalled \| -30\.0 \[[^]]*\] points \| worse \| ", text)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count(" | ") for line in rows if "objects recalled |" in line or "cell |" in line} == {4}


def test_measures_and_sweeps_can_be_chosen(before: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    after = write(tmp_path / "after", shifted(0.3), sweep="other")
    found = told(capsys, before, after, "--measure", "ppl,tpot", code=0)
    assert {name for cell in found["cells"] for name in cell["same"]} == {"ppl"}
    assert {one["measure"] for cell in found["cells"] for one in cell["comparisons"]} <= {"tpot_ms"}
    assert run(["diff", str(before), str(after), "--sweep", "frist"]) == 2
    assert "did you mean 'first'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{before}"], "the following arguments are required: B; kvbench diff --help lists flags"),
        (["{before}", "{before}x"], "there is no such file or folder; did you mean '{before}'?"),
        (["{before}/cells", "{before}"], "no results folder: there is no cells folder in {before}/cells"),
        (["{before}", "{page}"], "a page without its records: there is no cells folder in"),
        (["{before}", "{other}"], "none of which both have, and no number of them can be compared"),
        (["{failed}", "{failed}"], "1 of which both have, and no number of them can be compared"),
        (["{before}", "{torn}"], "holds no record that can be used; cells/a/record.json: is torn"),
        (["{before}", "{before}", "--measure", "pppl"], "--measure is 'pppl'; did you mean 'ppl'?"),
        (["{before}", "{before}", "--measure", "length_ratio"], "--measure is 'length_ratio'"),
        (["{before}", "{before}", "--margin", "ppl=-1"], "above 0"),
        (["{before}", "{before}", "--samples", "-1"], "--samples is -1; it must be 0 or more"),
        (["{before}", "{before}", "--format", "html"], "--format is 'html'; known: json, markdown, text"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(
    before: Path, tmp_path: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    deep = tmp_path / "a" / "b" / "c"
    deep.mkdir(parents=True)
    (deep / "report.html").write_text("<html>")
    write_cell(tmp_path / "other", body(policy="random"))
    write_cell(tmp_path / "failed", body(status="crash"))
    (tmp_path / "torn" / "cells" / "a").mkdir(parents=True)
    (tmp_path / "torn" / "cells" / "a" / "record.json").write_text("{")
    places = {name: tmp_path / name for name in ("before", "other", "failed", "torn")} | {"page": deep / "report.html"}
    assert run(["diff", *(word.format(**places) for word in words)]) == 2
    seen = capsys.readouterr()
    assert (seen.out, seen.err.count("\n")) == ("", 1)
    assert said.format(**places) in seen.err


def test_control_characters_of_a_record_do_not_reach_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = "\x1b[2Jgone"
    for name, by in (("a", 0.0), ("b", 0.3)):
        record = body(policy=evil)
        for sample in record["samples"]:
            sample |= {"id": f"{evil}{sample['id']}", RECALLED: sample[RECALLED] / 4 - by + 0.4}
        record["cell"][evil] = f"{evil}{name}"
        record["started_utc"] = name
        write_cell(tmp_path / name, record)
    for words in ([], ["--format", "json"]):
        assert "\x1b" not in printed(capsys, tmp_path / "a", tmp_path / "b", *words, code=1)


@pytest.mark.long
def test_it_needs_neither_torch_nor_hydra_nor_figures(before: Path) -> None:
    code = (
        "import sys; from kvbench.cli.main import run; code = run(['diff', sys.argv[1], sys.argv[1]]); "
        "sys.exit(code or bool({'torch', 'transformers', 'hydra', 'wandb', 'matplotlib'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code, str(before)], capture_output=True, check=False).returncode == 0
