"""The real command line, killed while it sweeps the bundled model, and started again until it is done."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvbench.cli.main import run
from kvbench.report.load import load_results
from kvbench.report.tables import csv_text, quality_frame
from kvbench.results.store import verify
from tests.trust.test_kills import REPO

WORDS = (
    *("-m", "policy=h2o,streaming_llm", "budget.fraction=0.2,0.5", "task=perplexity", "dataset.num_samples=2"),
    *("batch_size=2", "sink=console"),
)
NUM_CELLS = 4


def start(folder: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "kvbench", *WORDS, f"results={folder}"]
    return subprocess.Popen(
        command, cwd=folder.parent, env=environment, start_new_session=True, stdout=subprocess.PIPE, text=True
    )


def kill_at(folder: Path, num_records: int) -> bool:
    """Start the sweep and kill all of it when that many records are there; False if it ended before."""
    sweep = start(folder)
    deadline_s = time.monotonic() + 240
    while sweep.poll() is None and time.monotonic() < deadline_s:
        if len(list(folder.glob("cells/*/record.json"))) >= num_records:
            os.killpg(sweep.pid, signal.SIGKILL)
            sweep.communicate()
            return True
        time.sleep(0.005)
    sweep.communicate()
    return False


def quality(folder: Path) -> str:
    assert verify(folder).problems == ()
    return csv_text(quality_frame(load_results(folder)))


@pytest.mark.parametrize("instants", [pytest.param([1], id="one kill"), pytest.param([0, 1, 2, 3], id="four kills")])
@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_killed_sweep_goes_on_and_ends_with_the_same_table(
    tmp_path: Path, instants: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run([*WORDS, "results=undisturbed"]) == 0
    folder = tmp_path / "killed"
    kills = [kill_at(folder, number) for number in instants]
    assert any(kills), "it was never killed"
    kept = {path: path.read_bytes() for path in folder.glob("cells/*/record.json")}
    assert len(kept) < NUM_CELLS
    capsys.readouterr()
    assert run([*WORDS, "results=killed"]) == 0
    assert f"{len(kept)} of {NUM_CELLS} cells were done already" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in kept} == kept
    assert quality(folder) == quality(tmp_path / "undisturbed")
