"""The verdict table as markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from kvbench.report.load import load_results
from kvbench.report.page_tables import latency_html, verdicts_html
from kvbench.report.standing import Judged, judge
from kvbench.report.verdicts import (
    RATIO_NOTE,
    cell_rows,
    tex,
    verdict_table,
    verdicts_csv,
    verdicts_latex,
    verdicts_markdown,
)
from tests.report.synthetic import body, write_cell, write_sweep

HARD = r'a_b & 50 % of #1 {x} ~ ^ $y$ \input{z} <q> | "[r]" -3'


def judged_of(folder: Path) -> list[Judged]:
    return [judge(group) for group in load_results(folder).groups]


def csv_rows(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(verdicts_csv(judged_of(folder)))))


def test_every_format_has_every_cell_and_its_verdict_the_same_bytes_twice(sweep_folder: Path) -> None:
    for make in (verdicts_markdown, verdicts_csv, verdicts_latex):
        text = make(judged_of(sweep_folder))
        assert text == make(judged_of(sweep_folder))
        for word in ("h2o", "elastic", "random", "worse", "reference"):
            assert word.replace("_", "\\_") in text
    table, *matrices = verdicts_markdown(judged_of(sweep_folder)).split("### Policy against policy: ")
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 13
    assert len({line.count("|") for line in rows}) == 1
    assert len(matrices) > 4
    for matrix in matrices:
        rows = [line for line in matrix.splitlines() if line.startswith("|")]
        assert len(rows) == 2 + 12
        assert {line.count("|") for line in rows} == {7}


def test_each_policy_against_each_other_is_a_table_of_its_own_in_latex(sweep_folder: Path) -> None:
    text = verdicts_latex(judged_of(sweep_folder))
    assert text.count(r"\begin{table}") == 1
    assert text.count(r"\begin{table*}") == text.count(r"\bottomrule") - 1 == text.count("Policy against policy: ") > 3
    assert r"budget & policy & against elastic & against h2o & against random & against streaming\_llm \\" in text
    better = r"better: \+0\.\d+ \{\[\}\+0\.\d+, \+0\.\d+\], p \\textless\{\} 0\.001"
    assert re.search(rf"\n20 \\% tokens kept & h2o & \w+: [^&]+ &  & {better} & {better} \\\\\n", text)


def test_csv_holds_intervals_in_base_units_for_every_quality_measure(sweep_folder: Path) -> None:
    rows = csv_rows(sweep_folder)
    measures = {row["measure"] for row in rows}
    assert {"rougeL_vs_full", "objects_recalled_fraction", "ppl"} <= measures
    assert len(rows) == 13 * len(measures)
    row = next(r for r in rows if r["policy"] == "h2o" and r["budget_fraction"] == "0.2" and r["measure"] == "ppl")
    assert float(row["difference_low"]) < float(row["difference"]) < float(row["difference_high"])
    assert row["num_samples"] == "32"
    assert float(row["kv_stored_bytes"]) > 1000
    assert row["verdict"] in ("better", "worse", "equivalent", "undecided")


def test_a_ratio_follows_from_the_two_times_beside_it_or_says_that_of_the_medians(tmp_path: Path) -> None:
    for policy, tpot_ms in (("h2o", 2.78), ("elastic", 2.5)):
        record = body(policy=policy)
        times = {"tpot_ms": tpot_ms, "full_tpot_ms": 1.67, "tpot_ratio_to_full": 1.6647}
        record["measurements"] |= {name: {"value": value, "low": None, "n": 6} for name, value in times.items()}
        write_cell(tmp_path, record)
    (judged,) = judged_of(tmp_path)
    by_name = {row[0]: dict(zip(verdict_table(judged).heads, row, strict=True)) for row in verdict_table(judged).rows}
    shown = [[by_name[name][head] for head in ("TPOT", "full's TPOT", "TPOT / full")] for name in ("h2o", "elastic")]
    assert shown == [["2.78 ms", "1.67 ms", "1.66x"], ["2.50 ms", "1.67 ms", "1.66x (of medians 1.50x)"]]
    text = verdicts_markdown([judged])
    assert all(word in text for word in ("2.78 ms", "1.67 ms", "1.66x", "of medians 1.50x", RATIO_NOTE))
    text = verdicts_latex([judged])
    assert "1.66x" in text
    assert not re.search(r"\d ms|medians", text), "a paper's column has the ratio alone"
    for drawn in (verdicts_html(cell_rows(judged)), latency_html(judged.group)):
        rows = {name: drawn.replace("&nbsp;", " ").split(f">{name}<", 1)[1] for name in ("h2o", "elastic")}
        assert re.match(r".*?>2\.78 ms<.*?>1\.67 ms<.*?>1\.66x<", rows["h2o"], re.DOTALL)
        assert re.match(r".*?>1\.66x<small>of medians 1\.50x", rows["elastic"], re.DOTALL)
        assert drawn.count("of medians") == 1
        assert "geometric mean over their pairs" in drawn
    row = next(row for row in csv_rows(tmp_path) if row["policy"] == "h2o")
    assert (row["tpot_ms"], row["tpot_ms_of_full"], row["tpot_ratio_to_full"]) == ("2.78", "1.67", "1.6647")


def test_csv_text_is_no_formula_and_a_failed_cell_has_a_status_and_no_number(tmp_path: Path) -> None:
    write_cell(tmp_path, body(policy="=cmd()"))
    write_cell(tmp_path, body(policy="h2o", status="oom"))
    rows = csv_rows(tmp_path)
    assert {row["policy"] for row in rows} == {"'=cmd()", "h2o"}
    failed = next(row for row in rows if row["status"] == "oom")
    assert failed["verdict"] == "oom"
    assert failed["value"] == failed["tpot_ms"] == ""


def test_no_special_character_of_latex_is_left_bare() -> None:
    escaped = tex(HARD)
    named = r"\\(textbackslash|textasciicircum|textasciitilde|textless|textgreater|textbar)\{\}"
    without = re.sub(named, "", escaped)
    without = re.sub(r"\\[{}$&#%_]|\{\[\}|\$-\$", "", without)
    assert not set(without) & set('\\{}$&#%_^~<>|"[')
    assert tex("a\nb\x00c") == "a b c"


def column_rows(text: str) -> dict[str, dict[str, list[str]]]:
    """Return the entries of each row by budget and policy, of the first table of a LaTeX text."""
    found: dict[str, dict[str, list[str]]] = {}
    budget = ""
    for line in text[text.index(r"\midrule") : text.index(r"\bottomrule")].splitlines():
        if heading := re.match(r"\\multicolumn.*\\emph\{(.*)\}\} \\", line):
            budget = heading[1]
        elif " & " in line:
            policy, *entries = line.removesuffix(r" \\").split(" & ")
            found.setdefault(budget, {})[policy] = entries
    return found


def test_a_latex_table_has_a_column_for_what_is_compared_and_rules_of_booktabs(sweep_folder: Path) -> None:
    text = verdicts_latex(judged_of(sweep_folder)).split(r"\end{table}")[0]
    assert [text.count(rf"\{rule}rule") for rule in ("top", "mid", "bottom")] == [1, 4, 1]
    assert r"\hline" not in text
    assert "|" not in text[text.index(r"\begin{tabular}") :]
    found = column_rows(text)
    assert list(found) == ["", r"10 \% tokens kept", r"20 \% tokens kept", r"50 \% tokens kept"]
    assert {len(entries) for rows in found.values() for entries in rows.values()} <= {4, 5}
    assert found[""]["full"][1] == "reference"
    fit = r"\ifdim\wd0>\linewidth\resizebox{\linewidth}{!}{\usebox0}\else\usebox0\fi"
    assert fit in text, "no wider than the column, and no larger than it is"


def test_the_best_of_each_budget_is_bold_and_nothing_noisy_failed_or_alike_is(tmp_path: Path) -> None:
    write_cell(tmp_path, body(policy="full", budget=None))
    for policy, recalled, ratio in (("h2o", 0.5, 0.8), ("elastic", 0.25, 0.7), ("random", 0.25, 0.5)):
        record = body(policy=policy, status="noisy" if policy == "random" else "ok")
        record["measurements"] |= {
            "objects_recalled_fraction": {"value": recalled, "low": None, "high": None, "n": 32, "method": ""},
            "tpot_ratio_to_full": {"value": ratio, "low": None, "high": None, "n": 6, "method": ""},
        }
        write_cell(tmp_path, record)
    write_cell(tmp_path, body(policy="snapkv", status="oom"))
    text = verdicts_latex(judged_of(tmp_path)).split(r"\end{table}")[0]
    (rows,) = [rows for budget, rows in column_rows(text).items() if budget]
    assert (rows["h2o"][0], rows["elastic"][0]) == (r"\textbf{50.0 \%}", r"25.0 \%")
    assert (rows["h2o"][-2], rows["elastic"][-2], rows["random"][-2]) == ("0.80x", r"\textbf{0.70x}", r"$\sim$ 0.50x")
    assert len({entries[-1] for name, entries in rows.items() if name != "snapkv"}) == 1
    assert rows["snapkv"][0] == "oom"
    assert text.count(r"\textbf") == 2, "bytes are alike"
    assert r"$\sim$ noisy" in text.split(r"\sbox0")[0], "a mark is explained"


def test_the_tables_of_many_groups_are_never_more_floats_than_latex_holds_back(tmp_path: Path) -> None:
    for model in ("one", "two"):
        write_sweep(tmp_path, model=model)
    first, second = verdicts_latex(judged_of(tmp_path)).split("\\clearpage\n")
    assert 4 < first.count(r"\begin{table") == second.count(r"\begin{table") <= 52


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex on PATH")
def test_the_table_compiles_with_names_of_every_kind(tmp_path: Path) -> None:
    write_sweep(tmp_path / "results", model=HARD)
    write_cell(tmp_path / "results", body(policy=HARD, model=HARD, status="oom"))
    (tmp_path / "table.tex").write_text(verdicts_latex(judged_of(tmp_path / "results")), encoding="utf-8")
    (tmp_path / "paper.tex").write_text(
        r"\documentclass[twocolumn]{article}\usepackage{booktabs}\usepackage{graphicx}"
        r"\begin{document}\input{table.tex}\end{document}"
    )
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    if "not found" in done.stdout and "booktabs" in done.stdout:
        pytest.skip("this TeX has no booktabs")
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Overfull \\hbox" not in done.stdout
