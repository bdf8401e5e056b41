from __future__ import annotations

import contextlib
import importlib.util
from pathlib import Path

import pytest

from kvbench.cli.main import run
from kvbench.config.build import check_nothing_timed
from kvbench.config.compose import _unknown_choice, compose_grid
from kvbench.errors import ConfigError
from tests.sweep.test_faults import SHORT, attempts, faulty, kvbench

LAUNCHERS = {
    "joblib": ("hydra_joblib_launcher", ["hydra.launcher.n_jobs=2"]),
    "submitit_local": ("hydra_submitit_launcher", ["hydra.launcher.timeout_min=10"]),
}


def test_supervised_is_the_launcher_unless_another_is_asked_for() -> None:
    (single,) = compose_grid([], multirun=False, config_dir=None)
    assert (single.choices["hydra/launcher"], single.multirun) == ("supervised", False)
    grid = compose_grid(["policy=h2o,full"], multirun=True, config_dir=None)
    assert [(one.choices["hydra/launcher"], one.multirun) for one in grid] == [("supervised", True)] * 2
    assert compose_grid(["+experiment=quick"], multirun=False, config_dir=None)[0].multirun


def test_a_launcher_that_is_not_installed_is_told_with_its_command() -> None:
    from hydra.errors import MissingConfigException

    error = MissingConfigException("", missing_cfg_file="hydra/launcher/joblib", options=["basic"])
    assert "python -m pip install 'kvbench[sweep]'" in _unknown_choice(error)
    with pytest.raises(ConfigError, match="did you mean 'supervised'"):
        compose_grid(["hydra/launcher=supervise"], multirun=True, config_dir=None)


def test_a_launcher_without_a_sweep_is_refused(tmp_path: Path) -> None:
    done = kvbench(tmp_path, "hydra/launcher=basic", *SHORT)
    assert done.returncode == 2
    assert "add -m" in done.stderr


@pytest.mark.parametrize(
    ("task", "timed"),
    [("all", "speed, memory"), ("capacity", "capacity"), ("quality", ""), ("conversation", ""), ("perplexity", "")],
)
def test_cells_beside_each_other_on_one_machine_are_not_timed(task: str, timed: str) -> None:
    grid = compose_grid([f"task={task}", "policy=h2o,full"], multirun=True, config_dir=None)
    with contextlib.nullcontext() if not timed else pytest.raises(ConfigError, match=f"where task {timed} would"):
        check_nothing_timed("joblib", grid)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_such_a_launcher_is_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    pytest.importorskip(f"hydra_plugins.{LAUNCHERS[name][0]}")
    words = ["-m", f"hydra/launcher={name}", "policy=h2o,full", f"results={tmp_path / 'out'}"]
    assert run(words) == 2
    told = capsys.readouterr().err
    assert f"hydra/launcher is '{name}', which runs cells beside each other on this machine" in told
    assert told.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", LAUNCHERS)
def test_another_launcher_leaves_the_same_records_resumes_and_has_the_same_exit_code(tmp_path: Path, name: str) -> None:
    plugin, options = LAUNCHERS[name]
    if importlib.util.find_spec("hydra_plugins") is None or importlib.util.find_spec(f"hydra_plugins.{plugin}") is None:
        pytest.skip("the extra `sweep` is not installed")
    flags = faulty(tmp_path, gone=f"fault: sigkill\nonly_once: {tmp_path / 'mark'}", bad="fault: raises")
    words = [*flags, "-m", *SHORT, "policy=h2o,gone,bad", "results=out"]
    first = kvbench(tmp_path, *words, f"hydra/launcher={name}", *options)
    assert first.returncode == 1, first.stderr
    found = attempts(tmp_path / "out")
    statuses = {policy: [body["status"] for body in bodies] for policy, bodies in found.items()}
    assert statuses == {"h2o": ["ok"], "gone": ["killed", "ok"], "bad": ["crash"]}
    assert "1 of 3 cells failed" in first.stdout
    again = kvbench(tmp_path, *words)
    assert again.returncode == 1
    assert "2 of 3 cells were done already" in again.stdout
    supervised = kvbench(tmp_path, *SHORT, "policy=h2o", "results=other")
    assert supervised.returncode == 0
    other = attempts(tmp_path / "other")["h2o"][0]
    assert (other["measurements"], other["samples"]) == (found["h2o"][0]["measurements"], found["h2o"][0]["samples"])
