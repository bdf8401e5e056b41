"""`kvbench report --wandb`: the spec of the W&B Report, and its saving on a server that counts."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from kvbench.cli.main import run
from kvbench.results.record import read_record
from kvbench.sinks.wandb import report as wandb_report_save
from kvbench.sinks.wandb.content import summary_numbers
from kvbench.sinks.wandb.report import Chapter, Outline, report_spec, save_within
from tests.report.synthetic import body, write_cell
from tests.sinks.wandb.fault_server import FaultServer
from tests.sinks.wandb.test_wandb_faults import environment_of

REPO = Path(__file__).parents[3]
SPEC = Path("report") / "wandb_report.json"
GOLDEN, GOLDEN_VERSION = Path(__file__).with_name("wandb_report.golden.json"), "0.4.13"
_missing = [name for name in ("wandb", "wandb_workspaces") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(_missing), reason=f"not installed: {', '.join(_missing)}")


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("records")
    for policy, budget in (("full", None), ("h2o", 0.2), ("random", 0.2)):
        write_cell(folder, body(policy=policy, budget=budget, num_samples=8, sweep='it\'s "first"'))
    return folder


def outline(**changes: Any) -> Outline:
    chapter = Chapter(
        title="tiny-llava on scenes",
        chosen={"model.value.name": "tiny-llava", "dataset.value.name": "scenes"},
        text="| policy | verdict |\n|---|---|\n| h2o | worse |",
        quality=[("quality/ppl", "Perplexity"), ("quality/kl_to_full", "KL to full")],
        latency=[("latency/tpot_ms", "Time per output token")],
        memory=[("memory/kv_stored_bytes", "KV cache stored")],
        curves=["entries", "launches"],
    )
    settings: dict[str, Any] = {
        **{"title": "KV-cache policies, a", "description": "2 cells.", "sweeps": ["a"], "headline": "- h2o is best."},
        **{"chapters": [chapter], "figures": ["figures/1-quality"], "definitions": "- **PPL**: a definition."},
    }
    return Outline(**{**settings, **changes})


@pytest.fixture(scope="module")
def built(records: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What the command printed without an account, and the file that it wrote."""
    folder = tmp_path_factory.mktemp("built")
    return written(records, folder), folder / SPEC


@pytest.fixture(scope="module")
def spec(built: tuple[str, Path]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(built[1].read_text())
    return found


def written(records: Path, to: Path) -> str:
    """Copy the records, build the report there without an account, and return what is printed."""
    subprocess.run(["cp", "-a", f"{records}/.", str(to)], check=True)
    code = (
        "import sys; from kvbench.cli.main import run; from kvbench.report import build; "
        "build.draw_plots = lambda results: (); "  # the page's figures are in no W&B Report and take longest
        "sys.exit(run(['report', sys.argv[1], '--wandb']))"
    )
    command = [sys.executable, "-c", code, str(to)]
    done = subprocess.run(command, cwd=REPO, env=environment_of("no key", 9), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def grids(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [block["metadata"] for block in spec["spec"]["blocks"] if block["type"] == "panel-grid"]


def text_of(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


@pytest.mark.skipif(
    not _missing and version("wandb-workspaces") != GOLDEN_VERSION, reason=f"the golden file is of {GOLDEN_VERSION}"
)
def test_the_spec_is_the_golden_one() -> None:
    """To make it again after a change that is meant: KVBENCH_GOLDEN=write python -m pytest of this file."""
    text = json.dumps(report_spec(outline(), project="kvbench", entity=None), indent=1) + "\n"
    if os.environ.get("KVBENCH_GOLDEN") == "write":
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


@pytest.mark.long
def test_the_same_records_give_the_same_bytes(
    records: Path, built: tuple[str, Path], spec: dict[str, Any], tmp_path: Path
) -> None:
    printed, path = built
    assert printed.count("\n") == 1
    assert f"report written as its spec to {path} (no API key; see wandb login); save it later" in printed
    written(records, tmp_path)
    assert path.read_bytes() == (tmp_path / SPEC).read_bytes()
    assert (spec["project"], spec["entity"]) == ("kvbench", None)
    ids = re.findall(r'"(?:__)?id(?:__)?": "([^"]*)"', text_of(spec))
    assert ids == [f"id-{number}" for number in range(1, len(ids) + 1)]
    assert not re.search(r"20\d\d-\d\d-\d\d", text_of(spec)), "no date"


def test_the_text_has_the_verdicts_and_the_panels_only_keys_that_runs_have(records: Path, spec: dict[str, Any]) -> None:
    blocks = spec["spec"]["blocks"]
    headline, table, definitions = (block["content"] for block in blocks if block["type"] == "markdown-block")
    assert "20 % tokens kept, objects recalled: `h2o` is best with " in headline
    assert ", shown to be better than `random`." in headline
    assert "| h2o | 20 % tokens kept | log-loss of PPL, nats per token | +" in table
    assert " | worse | primary |" in table
    verdicts, matrix = table.split("### Policy against policy: ")
    assert "| budget | policy | against h2o | against random |" in matrix
    assert "| 20 % tokens kept | random | worse: -" in matrix
    assert "against h2o" not in verdicts
    assert "**Leaderboard at 20 % tokens kept by objects recalled**" in verdicts
    assert re.search(r"\n\| 1 \| h2o \| .* \| better: \+", verdicts)
    assert re.search(r"\n\| 2 \| random \| ", verdicts)
    assert "**Perplexity**: exp of" in definitions
    assert blocks[1]["type"] == "table-of-contents"
    known = set[str]()
    for path in (records / "cells").rglob("record.json"):
        known |= summary_numbers(read_record(path)).keys()
    named = set(re.findall(r"(?:quality|latency|memory)/\w+", text_of(grids(spec))))
    assert len(named) > 8
    assert named <= known
    kinds = {panel["viewType"] for grid in grids(spec) for panel in grid["panelBankSectionConfig"]["panels"]}
    assert kinds == {
        *("Scatter Plot", "Bar Chart", "Run History Line Plot", "Parallel Coordinates Plot"),
        *("Media Browser", "Weave"),
    }


def test_runs_are_chosen_by_sweep_and_grouped_by_policy_whatever_the_sweep_is_called(spec: dict[str, Any]) -> None:
    sets = [run_set for grid in grids(spec) for run_set in grid["runSets"]]
    for one in sets:
        chosen = {part["key"]["name"]: part["value"] for part in one["filters"]["filters"]}
        assert chosen == {"group": 'it\'s "first"', "jobType": "summary" if one["name"] == "summary" else "cell"}
    assert [one["grouping"] for one in sets[:-1]] == [[{"section": "config", "name": "policy.value.name"}]] * 4


def test_several_models_and_sweeps_are_told_apart() -> None:
    chosen = {"model.value.name": "m'2", "dataset.value.num_samples": 256}
    chapters = [outline().chapters[0], Chapter(**{**vars(outline().chapters[0]), "chosen": chosen})]
    spec = report_spec(outline(sweeps=["a", "b"], chapters=chapters), project="p", entity="e")
    found = text_of([run_set["filters"] for grid in grids(spec) for run_set in grid["runSets"]])
    for part in ('"a"', '"b"', '"m\'2"', '"model.value.name"', '"dataset.value.num_samples"', "256", '"OR"'):
        assert part in found


def test_a_report_is_saved_over_the_one_of_the_same_name_and_a_refusal_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def save(outline: Outline, *, project: str, entity: str | None, report_id: str) -> tuple[str, str]:
        asked.append(report_id)
        if project == "refused":
            raise ValueError("no such project")
        return f"https://host/{project}", "an-id"

    monkeypatch.setattr(wandb_report_save, "save_report", save)
    monkeypatch.setattr(wandb_report_save, "quiet_setup", lambda: "https://host")
    for _ in range(2):
        assert save_within(outline(), tmp_path, project="p", entity=None) == ("https://host/p", "")
    assert save_within(outline(title="another"), tmp_path, project="p", entity=None)[0] == "https://host/p"
    assert asked == ["", "an-id", ""]
    url, reason = save_within(outline(), tmp_path, project="refused", entity=None)
    assert (url, "no such project" in reason) == ("", True)


@pytest.mark.long
@pytest.mark.timeout(200)
def test_with_an_account_it_is_saved_and_the_next_time_saved_over(records: Path, tmp_path: Path) -> None:
    folder, server = tmp_path / "results", FaultServer("none")
    subprocess.run(["cp", "-a", str(records), str(folder)], check=True)
    code = (
        "import sys; from kvbench.cli.main import run; "
        "sys.exit(any(run(sys.argv[2:]) for _ in range(int(sys.argv[1]))))"
    )
    told = []
    try:
        for fault, times in (("none", "2"), ("403", "1")):
            server.fault = fault
            command = [sys.executable, "-c", code, times, "report", str(folder), "--wandb"]
            environment = environment_of(fault, server.port)
            told.append(subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=150))
            assert (told[-1].returncode, told[-1].stderr) == (0, "")
            if fault == "none":
                assert not (folder / SPEC).exists()
    finally:
        server.close()
    (first_id, first), (second_id, second) = server.reports
    assert (first_id, second_id) == (None, "view")
    assert "20 % tokens kept, objects recalled: `h2o` is best" in first
    made_up = r'"(?:__)?id(?:__)?":"[^"]*"'
    assert re.sub(made_up, "", first) == re.sub(made_up, "", second)
    assert told[0].stdout.count(f"report saved: http://127.0.0.1:{server.port}/e/kvbench/reports/") == 2
    assert told[1].stdout.count("report written as its spec to") == 1
    assert (folder / SPEC).exists()


def test_a_text_format_and_a_report_are_not_asked_for_together(
    records: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["report", str(records), "--wandb", "--format", "md"]) == 2
    assert "--wandb builds a W&B Report and --format md a text; give one of them" in capsys.readouterr().err


def test_without_the_package_the_flag_says_how_to_install_it(
    records: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "kvbench.sinks.wandb.run.importlib.util.find_spec",
        lambda name: None if name == "wandb_workspaces" else find(name),
    )
    assert run(["report", str(records), "--wandb"]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert "wandb-workspaces is not installed; python -m pip install 'kvbench[wandb-report]'" in told.err
