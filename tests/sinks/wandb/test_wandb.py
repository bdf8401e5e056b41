from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from kvbench.errors import ConfigError
from kvbench.results.store import RecordStore
from kvbench.sinks import SinkGroup
from kvbench.sinks.wandb.content import summary_numbers
from kvbench.sinks.wandb.run import has_api_key
from kvbench.sinks.wandb.sync import WandbSink
from tests.results.record_bodies import make_body

_installed = importlib.util.find_spec("wandb") is not None
needs_wandb = pytest.mark.skipif(not _installed, reason="wandb is not installed")


@pytest.fixture(autouse=True)
def _no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


@needs_wandb
def test_an_offline_run_holds_config_summary_curve_and_samples(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    curves = {"launches_ms": [[30.0, 3.5, 28.0, 3.25]], "capacity_tries": [[0, 8, 1.0]]}
    body = make_body(curves={**make_body()["curves"], **curves})
    sink = WandbSink(project="kvbench", folder=tmp_path / "my results", mode="auto")
    sink.open("demo", 2)
    sink.record(body)
    sink.record(make_body(1, status="oom", measurements={}, samples=[], curves={}))
    sink.close()
    printed = capfd.readouterr()
    folder = tmp_path / "my results" / "wandb"
    assert f"upload them with: wandb sync '{folder}'/offline-run-*" in printed.out
    assert printed.out.count("\n") == 1
    assert printed.err == ""
    (run_folder,) = folder.glob(f"offline-run-*-{body['key'][:16]}")
    _check_run(_inspect(run_folder, "--summary"), body)
    records = _inspect(run_folder)
    assert sum("entries/mean" in json.dumps(record) for record in records if record["type"] == "history") == 2
    assert not [record for record in records if record["type"] == "stats"]
    shown = [record["history"]["item"] for record in records if record["type"] == "history"]
    (launch,) = (item for item in shown if "launch" in item)
    assert (launch["launch"], launch["launches/tpot_ms"], launch["launches/full_tpot_ms"]) == (1, 3.5, 3.25)
    (tried,) = (item for item in shown if "try" in item)
    assert (tried["capacity/num_prompts"], tried["capacity/fits"]) == (8, 1)
    axes = {record["metric"].get("glob_name"): record["metric"].get("step_metric") for record in records
            if record["type"] == "metric"}  # fmt: skip
    assert {"entries/*": "seen_tokens", "launches/*": "launch", "capacity/*": "try"}.items() <= axes.items()


@needs_wandb
def test_nothing_of_wandb_runs_but_while_a_run_is_written(tmp_path: Path) -> None:
    def running() -> list[str]:
        threads = [thread.name for thread in threading.enumerate() if thread.name.startswith("wandb")]
        return [process.name() for process in psutil.Process().children() if "wandb" in process.name()] + threads

    sink = WandbSink(project="kvbench", folder=tmp_path)
    group = SinkGroup([sink])
    group.open("demo", 2)
    assert running() == [], "whether there is a key was asked"
    group.record(make_body())
    group.flush()
    assert running() == []
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 1
    group.close()


def _check_run(run: dict[str, Any], body: dict[str, Any]) -> None:
    assert run["run_id"] == body["key"][:16]
    assert run["name"] == "h2o@20 % tokens kept"
    assert run["tags"] == ["h2o", "ok", "scenes", "tiny-llava"]
    assert run["config"]["policy"] == body["cell"]["policy"]
    assert run["config"]["dataset"] == {"name": "scenes"}
    assert run["config"]["key"] == body["key"]
    summary = run["summary"]
    assert (summary["status"], summary["quality/ppl"], summary["quality/ppl_low"]) == ("ok", 1.25, 1.125)
    assert (summary["latency/tpot_ms"], summary["memory/kv_stored_bytes"]) == (3.5, 2**20)
    assert not {"quality/ppl_high", "quality/kl_to_full", "entries/mean", "launches/tpot_ms"} & summary.keys()
    assert summary["samples"]["nrows"] == 2


def _inspect(run_folder: Path, *options: str) -> Any:
    command = [shutil.which("wandb") or str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json"]
    output = subprocess.run([*command, *options, str(run_folder)], capture_output=True, text=True, check=True).stdout
    return json.loads(output) if options else [json.loads(line) for line in output.splitlines()]


@pytest.mark.long
@needs_wandb
def test_a_server_that_never_answers_costs_the_time_limit_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        started = time.monotonic()
        _run_in_own_process(tmp_path)
        assert time.monotonic() - started < 10
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 3
    printed = capfd.readouterr().out
    assert "3 runs kept offline (the online run failed" in printed
    assert printed.count("\n") == 1


def _run_in_own_process(folder: Path) -> None:
    # wandb keeps the server's address for the life of a process.
    code = """
import sys
from pathlib import Path
from kvbench.results.store import RecordStore
from kvbench.sinks.wandb.sync import WandbSink
from tests.results.record_bodies import make_body
sink = WandbSink(project="p", folder=Path(sys.argv[1]), timeout_s=1.0)
sink.open("demo", 3)
for seed in range(3):
    sink.record(make_body(seed))
sink.close()
"""
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, timeout=60, env=environment, cwd=root)


def test_disabled_writes_nothing(tmp_path: Path) -> None:
    sink = WandbSink(project="p", mode="disabled", folder=tmp_path)
    sink.open("demo", 1)
    sink.record(make_body())
    sink.close()
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    sink = WandbSink(project="p", folder=tmp_path)
    sink.open("demo", 1)
    sink.record(make_body())
    sink.close()
    assert [record.getMessage().split(",")[0] for record in caplog.records] == ["wandb is not installed"]
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'offline'"):
        WandbSink(project="p", mode="ofline")


def test_a_key_is_found_in_the_environment_and_in_a_netrc_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = "https://wandb.example.org"
    assert not has_api_key(server)
    netrc = tmp_path / "netrc"
    netrc.write_text("machine wandb.example.org login user password secret\n")
    monkeypatch.setenv("NETRC", str(netrc))
    assert has_api_key(server)
    netrc.write_text("broken {")
    assert not has_api_key(server)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert has_api_key(server)


def test_measurements_are_grouped_by_what_they_measure() -> None:
    names = (
        *("rougeL_vs_full", "policy_ms", "throughput_tokens_per_s", "entries_peak", "realised_budget_fraction"),
        *(
            "full_tpot_ms",
            "roof_share_fraction",
            "copy_bandwidth_bytes_per_s",
            "capacity_prompts",
            "tpot_ratio_to_full",
        ),
        *("peak_over_bound_ratio", "turn2_realised_budget_fraction", "num_skipped_items", "length_ratio", "unheard_of"),
    )
    numbers = summary_numbers({"measurements": {name: {"value": 1.0} for name in names}})
    assert list(numbers) == [
        "quality/rougeL_vs_full",
        "latency/policy_ms",
        "latency/throughput_tokens_per_s",
        "memory/entries_peak",
        "memory/realised_budget_fraction",
        "latency/full_tpot_ms",
        "latency/roof_share_fraction",
        "latency/copy_bandwidth_bytes_per_s",
        "latency/capacity_prompts",
        "latency/tpot_ratio_to_full",
        "memory/peak_over_bound_ratio",
        "memory/turn2_realised_budget_fraction",
        "quality/num_skipped_items",
        "quality/length_ratio",
        "quality/unheard_of",
    ]


def test_a_failed_attempt_is_not_sent_over_the_run_of_a_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[str] = []
    monkeypatch.setattr(WandbSink, "_send", lambda self, spec: sent.append(spec.id))
    sink, good, failed = WandbSink(project="kvbench", folder=tmp_path), make_body(), make_body(status="oom")
    other = make_body(1, status="oom")
    for body in (good, failed, other):
        RecordStore(tmp_path).commit(body, replace=True)
        sink.record(body)
    assert sent == [good["key"][:16], other["key"][:16]]
