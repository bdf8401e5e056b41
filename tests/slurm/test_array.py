"""A real SLURM of one node: an array sweep with a job that is taken away, and two jobs on one folder."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvbench.results.store import RecordStore
from tests.sweep.test_faults import SHORT, attempts, environment

HERE = Path(__file__).parent
MISSING = [name for name in ("slurmctld", "slurmd", "munged", "sbatch") if shutil.which(name) is None]
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {MISSING}; apt-get install -y slurm-wlm munge"),
    pytest.mark.skipif(os.geteuid() != 0, reason="slurmd must be started by root"),
    pytest.mark.timeout(1200),
]
SWEEP = ("-m", *SHORT, "policy=random,h2o,streaming_llm,elastic", "budget.fraction=0.2,0.5", "dataset.num_samples=2")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Environment of commands that talk to the test's own SLURM."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    folder = tmp_path_factory.mktemp("slurm")
    try:
        subprocess.run([HERE / "start", folder], check=True, timeout=90)
        yield {**environment(folder), "SLURM_CONF": str(folder / "slurm.conf")}
    finally:
        subprocess.run([HERE / "stop", folder], check=False, timeout=30)


def ask(slurm: dict[str, str], *command: str) -> str:
    return subprocess.run(command, env=slurm, capture_output=True, text=True, timeout=30, check=True).stdout.strip()


def wait_for(happened: Callable[[], Any], limit_s: float) -> Any:
    end_s = time.monotonic() + limit_s
    while not (found := happened()):
        assert time.monotonic() < end_s, "it did not happen in time"
        time.sleep(0.5)
    return found


def accepted(results: Path) -> int:
    return len(list(results.glob("cells/*/record.json")))


def test_an_array_of_eight_cells_with_one_job_requeued_ends_complete(slurm: dict[str, str], tmp_path: Path) -> None:
    options = {"partition": "debug", "cpus_per_task": 1, "mem_gb": 3, "timeout_min": 10, "array_parallelism": 2}
    words = [f"hydra.launcher.{name}={value}" for name, value in options.items()]
    command = [sys.executable, "-m", "kvbench", *SWEEP, "hydra/launcher=submitit_slurm", *words, "results=out"]
    out = tmp_path / "out"
    with (tmp_path / "log").open("w") as log:
        sweep = subprocess.Popen(command, cwd=tmp_path, env=slurm, stdout=log, stderr=log)
        wait_for(lambda: list(out.glob("cells/*/batches/*.json")), 300)
        jobs = ask(slurm, "squeue", "--noheader", "--array", "--states", "R", "--format", "%i").split()
        ask(slurm, "scontrol", "requeue", jobs[0])
        wait_for(lambda: "PENDING" in ask(slurm, "scontrol", "show", "job", jobs[0]), 60)
        ask(slurm, "scontrol", "update", f"JobId={jobs[0]}", "StartTime=now")  # SLURM itself waits two minutes
        assert sweep.wait(900) == 0, (tmp_path / "log").read_text()
    assert accepted(out) == 8
    keys = [body["key"] for bodies in attempts(out).values() for body in bodies]
    assert all(RecordStore(out).accepted(key) is not None for key in keys)
    (job_log,) = out.glob(f".hydra/.submitit/{jobs[0]}/*.out")
    assert job_log.read_text().count("Starting with JobEnvironment") == 2, "the job ran twice"


def test_two_jobs_share_one_sweep_and_no_cell_is_measured_twice(slurm: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    line = " ".join([sys.executable, "-m", "kvbench", *SWEEP, "worker.group_cells=2", f"results={out}"])
    options = ["--array=0-1", "--cpus-per-task=1", "--mem=3G", "--time=10", "--requeue", f"--chdir={tmp_path}"]
    job = ask(slurm, "sbatch", "--parsable", *options, f"--wrap={line}")
    wait_for(lambda: not ask(slurm, "squeue", "--noheader", "--jobs", job), 900)
    logs = "\n".join(path.read_text() for path in tmp_path.glob("slurm-*.out"))
    assert accepted(out) == 8, logs
    assert len(list(out.glob("cells/*/attempt-*.json"))) == 8, "each cell was measured once"
    assert len(re.findall(r"^\[\d/8\] ok", logs, re.MULTILINE)) == 8, logs
