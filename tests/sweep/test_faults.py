"""Whatever a cell does costs that cell: real workers, the bundled model, policies that go wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from kvbench.results.store import RecordStore

REPO = Path(__file__).parents[2]
SHORT = ("task=perplexity", "dataset.num_samples=1", "dataset.ask=follow_up", "batch_size=1", "sink=console")
EXPECTED = {
    "sigkill": ("killed", "SIGKILL", 2),
    "sigterm": ("killed", "SIGTERM", 2),
    "sys_exit": ("crash", "SystemExit", 1),
    "os_exit": ("crash", "ProcessExit", 1),
    "segfault": ("crash", "SIGSEGV", 1),
    "oom": ("oom", "OutOfMemoryError", 2),
    "not_finite": ("nonfinite", "NonFiniteError", 1),
    "raises": ("crash", "ZeroDivisionError", 1),
    "loops": ("timeout", "Timeout", 1),
}


def environment(tmp_path: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "SLURM"))}
    return {**kept, "HOME": str(tmp_path), "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}


def faulty(folder: Path, **yamls: str) -> list[str]:
    (folder / "conf" / "policy").mkdir(parents=True, exist_ok=True)
    for name, rest in yamls.items():
        text = f"_target_: tests.faulty_policies.Faulty\n{rest}\n"
        (folder / "conf" / "policy" / f"{name}.yaml").write_text(text)
    return ["--config-dir", "conf"]


def kvbench(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvbench", *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=500, check=False
    )


def attempts(results: Path) -> dict[str, list[dict[str, Any]]]:
    """Return all attempts by policy, oldest first."""
    found: dict[str, list[dict[str, Any]]] = {}
    for folder in sorted((results / "cells").iterdir()):
        key = json.loads(next(folder.glob("attempt-*.json")).read_text())["body"]["key"]
        bodies = RecordStore(results).attempts(key)
        found[bodies[0]["labels"]["policy"]] = bodies
    return found


@pytest.mark.long
def test_one_fault_of_each_kind_in_a_sweep_of_good_cells(tmp_path: Path) -> None:
    once = f"fault: sigkill\nonly_once: {tmp_path / 'mark'}"
    flags = faulty(tmp_path, once=once, leaves="fault: os_exit", raises="fault: raises")
    done = kvbench(tmp_path, *flags, "-m", *SHORT, "policy=once,leaves,raises,h2o", "results=out")
    assert done.returncode == 1, done.stderr
    found = attempts(tmp_path / "out")
    statuses = {name: [body["status"] for body in bodies] for name, bodies in found.items()}
    assert statuses == {"once": ["killed", "ok"], "leaves": ["crash"], "raises": ["crash"], "h2o": ["ok"]}
    assert "ok*        once" in done.stdout
    assert "2 of 4 cells failed" in done.stdout


@pytest.mark.long
def test_a_sweep_that_is_stopped_ends_in_order_and_goes_on(tmp_path: Path) -> None:
    flags = faulty(tmp_path, waits=f"fault: loops\nonly_once: {tmp_path / 'mark'}")
    words = [*flags, "-m", *SHORT, "policy=h2o,waits", "results=out", "worker.isolation=cell"]
    command = [sys.executable, "-m", "kvbench", *words]
    sweep = subprocess.Popen(command, cwd=tmp_path, env=environment(tmp_path), stderr=subprocess.PIPE, text=True)
    end_s = time.monotonic() + 240
    while not (tmp_path / "mark").exists():
        assert sweep.poll() is None
        assert time.monotonic() < end_s
        time.sleep(0.1)
    sweep.send_signal(signal.SIGTERM)
    assert sweep.wait(60) == 143
    assert sweep.stderr is not None
    assert "the same command goes on" in sweep.stderr.read()
    assert {n: b[-1]["status"] for n, b in attempts(tmp_path / "out").items()} == {"h2o": "ok", "waits": "preempted"}
    again = kvbench(tmp_path, *words)
    assert again.returncode == 0, again.stderr
    assert "1 of 2 cells were done already" in again.stdout


@pytest.mark.long
@pytest.mark.timeout(900)
def test_every_fault_costs_one_cell(tmp_path: Path) -> None:
    flags = faulty(tmp_path, **{name: f"fault: {name}" for name in EXPECTED})
    order = ["random", *EXPECTED, "h2o"]
    words = [*SHORT, f"policy={','.join(order)}", "results=out", "worker.timeout_s=20"]
    done = kvbench(tmp_path, *flags, "-m", *words)
    assert done.returncode == 1, done.stderr
    found = attempts(tmp_path / "out")
    assert set(found) == set(order)
    for name, (status, kind, tries) in EXPECTED.items():
        last = found[name][-1]
        told = (last["status"], last["error"]["type"], last["phase"], len(found[name]))
        assert told == (status, kind, "perplexity", tries), name
        # The progress too names the cell that it is at.
        said = [line for line in done.stdout.splitlines() if f" {name} " in line and "batches" not in line]
        assert status in said[0]
    assert "_loops" in found["loops"][0]["error"]["traceback"], "the stack of a stuck worker is kept"
    assert "_segfault" in found["segfault"][0]["error"]["traceback"]
    good = [found[name][0] for name in ("random", "h2o")]
    assert [body["status"] for body in good] == ["ok", "ok"]
    assert "9 of 11 cells failed" in done.stdout
    alone = kvbench(tmp_path, *SHORT, "policy=h2o", "results=alone")
    assert alone.returncode == 0, alone.stderr
    (expected,) = attempts(tmp_path / "alone")["h2o"]
    assert (expected["measurements"], expected["samples"]) == (good[1]["measurements"], good[1]["samples"])
