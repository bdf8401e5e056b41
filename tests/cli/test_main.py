from __future__ import annotations

import io
import itertools
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
from tqdm import tqdm

from kvbench.cli.main import _get_ready_to_show, _show_tables, run
from kvbench.cli.sweep import quiet_libraries
from kvbench.errors import ConfigError
from kvbench.report.build import inputs_digest
from kvbench.report.figures import FIGURES
from kvbench.results.record import MEASURED
from kvbench.sinks.wandb.content import summary_id
from kvbench.sweep.process import Begun

REPO = Path(__file__).parents[2]
SHORT = (
    "dataset.num_samples=2",
    "batch_size=2",
    "task.generation.max_new_tokens=6",
    "task.fidelity.max_new_tokens=6",
    "task.fidelity.check_tokens=2",
    "task.speed.new_tokens=3",
    "task.speed.num_blocks=1",
    "task.memory.new_tokens=2",
)
QUICK = ("+experiment=quick", "sink=console", *SHORT)


@pytest.fixture(autouse=True)
def _no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No W&B key is found, and neither modules nor files of one test reach another."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module", autouse=True)
def _two_figures() -> Iterator[None]:
    """Draw no more of them: each takes half a second, and tests of the report look at all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvbench.report.figures.draw.FIGURES", {kind: FIGURES[kind] for kind in ("quality", "memory")})
        yield


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory, _two_figures: None) -> Path:
    """The results of the quick experiment."""
    folder = tmp_path_factory.mktemp("quick")
    assert run([*QUICK, f"results={folder}"], begins_early=True) == 0
    return folder


def bodies(results: Path) -> dict[str, dict[str, Any]]:
    """Return the accepted records by policy."""
    read = [json.loads(path.read_text())["body"] for path in results.glob("cells/*/record.json")]
    return {body["labels"]["policy"]: body for body in read}


def test_help_needs_no_more_than_a_few_imports_of_the_standard_library() -> None:
    """Modules are counted, not seconds: importing torch alone brings more than a thousand."""
    code = "import sys; sys.argv = ['kvbench', '--help']\nfrom kvbench.cli.main import main\n" + (
        "try:\n    main()\nfinally:\n    print(len(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    printed = done.stdout
    assert int(done.stderr) < 400
    for word in ("streaming_llm", "tiny-llava", "conversation", "--config-dir", "exit codes", "in_cache"):
        assert word in printed


def test_the_word_help_prints_what_the_flag_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert [run([word]) for word in ("--help", "help")] == [0, 0]
    whole = capsys.readouterr().out
    assert whole == 2 * whole[: len(whole) // 2]
    with pytest.raises(SystemExit) as ended:
        run(["help", "audit"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("usage: kvbench audit")


@pytest.mark.parametrize("flag", ["-h", "--help", "--version"])
def test_a_flag_that_only_prints_ends_with_zero(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([flag]) == 0
    assert capsys.readouterr().out.startswith("kvbench ")


def test_the_command_line_imports_neither_torch_nor_hydra() -> None:
    heavy = {"torch", "transformers", "hydra", "pandas", "matplotlib", "wandb"}
    code = f"import sys, kvbench.cli; print(*({heavy!r} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True).stdout.strip() == ""


def test_the_quick_experiment_leaves_records_tables_and_a_page(quick: Path) -> None:
    found = bodies(quick)
    assert set(found) == {"full", "h2o"}
    assert {body["status"] for body in found.values()} <= set(MEASURED)
    assert {body["sweep"] for body in found.values()} == {"quick"}
    for name in ("ppl", "rougeL_vs_full", "kl_to_full", "tpot_ratio_to_full", "kv_stored_bytes", "objects_f1"):
        assert found["h2o"]["measurements"][name]["value"] is not None
    assert found["full"]["measurements"]["rougeL_vs_full"]["value"] == 1.0
    for name in ("table.csv", "table.parquet", "report/index.html"):
        assert (quick / name).stat().st_size > 0
    assert not list(quick.glob("wandb")), "sink=console sends nothing to W&B"


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[Begun]:
    """Every process that begins before it has a job."""
    found: list[Begun] = []

    class Noted(Begun):
        def __init__(self, *of: Any, **options: Any) -> None:
            super().__init__(*of, **options)
            found.append(self)

    monkeypatch.setattr("kvbench.sweep.process.Begun", Noted)
    return found


@pytest.mark.parametrize(
    "words", [["policy=h2p"], ["policy=h2o", "budget.fraction=2"], ["-m", "policy=h2o,full", "model=local"]]
)
def test_a_refused_cell_is_one_line_and_the_process_that_has_begun_is_ended(
    words: list[str], begun: list[Begun], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run([*words, "sink=console", f"results={tmp_path / 'r'}"], begins_early=True) == 2
    printed = capfd.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert len(begun) == 1
    assert not begun[0].is_alive
    assert not (tmp_path / "r").exists()


def test_no_process_begins_for_what_measures_nothing_here(
    quick: Path, begun: list[Begun], capfd: pytest.CaptureFixture[str]
) -> None:
    for words in (["--help"], ["policy=h2o", "--cfg", "job"], ["results", "list", str(quick)], ["policies", "h2o"]):
        assert run(words, begins_early=True) == 0
    assert run(["-m", "hydra/launcher=joblib", "policy=h2p"], begins_early=True) == 2
    assert begun == []
    assert run([*QUICK, f"results={quick}"], begins_early=True) == 0
    assert begun == [], "all was done"
    assert "nothing" not in capfd.readouterr().err


def test_a_process_begins_for_cells_that_a_used_folder_may_lack(begun: list[Begun], tmp_path: Path) -> None:
    used = tmp_path / "r" / "cells"
    used.mkdir(parents=True)
    refused = ["-m", "policy=h2o,full", "model=local", f"model.checkpoint={tmp_path}", f"results={tmp_path / 'r'}"]
    for number, expected in enumerate((1, 1, 0)):
        assert run(refused, begins_early=True) == 2
        assert [one.is_alive for one in begun] == [False] * expected, f"{number} of two cells are there"
        begun.clear()
        (used / str(number)).mkdir()


def test_a_process_that_no_worker_will_be_is_ended_before_another_launcher_runs(
    begun: list[Begun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[bool] = []
    monkeypatch.setattr("kvbench.cli.main._slots_to_be", lambda overrides: [{}])  # where a yaml chose the launcher
    monkeypatch.setattr("kvbench.cli.main._hand_to_hydra", lambda *_: alive.extend(one.is_alive for one in begun))
    words = ["-m", "hydra/launcher=joblib", "task=perplexity", "sink=console", "dataset.num_samples=2"]
    assert run([*words, f"results={tmp_path / 'r'}"], begins_early=True) == 1
    assert alive == [False]


def test_as_many_processes_begin_as_there_will_be_workers_on_the_gpus_of_the_machine(
    begun: list[Begun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvbench.cli.main._num_gpus", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    refused = ["-m", "policy=h2o,full", "model=local", f"model.checkpoint={tmp_path}", f"results={tmp_path / 'r'}"]
    assert run(refused, begins_early=True) == 2
    assert [one.slot for one in begun] == [{"CUDA_VISIBLE_DEVICES": number} for number in "01"], "for two cells"
    begun.clear()
    assert run([*refused, "device=cuda:1"], begins_early=True) == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert run(refused, begins_early=True) == 2
    assert [one.slot for one in begun] == [{}, {}]


def test_a_report_that_cannot_be_imported_is_told_when_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kvbench.report.build", None)
    _get_ready_to_show()
    with pytest.raises(ImportError):
        _show_tables(Path("r"), set())


def test_a_second_run_measures_nothing(quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(path.name for path in quick.glob("cells/*/*"))
    assert run([*QUICK, f"results={quick}"]) == 0
    assert sorted(path.name for path in quick.glob("cells/*/*")) == before
    assert "2 of 2 cells were done already" in capsys.readouterr().out


@pytest.mark.long
def test_the_report_is_made_again_from_records(
    quick: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = quick / "report" / "index.html"
    text = page.read_bytes()
    page.unlink()
    assert run(["report", str(quick)]) == 0
    assert page.read_bytes() == text
    assert str(page) in capsys.readouterr().out
    monkeypatch.setattr("kvbench.report.build.draw_plots", lambda results: ())
    assert run(["report", str(quick), "--sweep", "quick"]) == 0
    assert run(["report", str(quick), "--sweep", "slow"]) == 2


@pytest.mark.long
def test_one_cell_runs_and_its_wandb_run_is_kept_offline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["policy=h2o", "task=perplexity", "dataset.num_samples=1", "results=out"]) == 0
    printed = capsys.readouterr().out
    assert bodies(tmp_path / "out")["h2o"]["status"] == "ok"
    (folder,) = (tmp_path / "out" / "wandb").glob("offline-run-*")
    assert list(folder.glob("*.wandb"))
    assert printed.count(f"upload them with: wandb sync {tmp_path / 'out' / 'wandb'}/offline-run-*") == 1


@pytest.mark.long
def test_a_sweep_has_a_summary_run_and_nothing_is_left_to_sync(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["-m", "policy=full,h2o", "task=perplexity", "dataset.num_samples=2", "results=out", "sweep=two"]
    assert run(words) == 0
    printed = capsys.readouterr().out
    folders = list((tmp_path / "out" / "wandb").glob("offline-run-*"))
    assert len(folders) == 3
    keys = [body["key"] for body in bodies(tmp_path / "out").values()]
    assert summary_id("two", keys) in {folder.name.rpartition("-")[2] for folder in folders}
    assert printed.count("wandb: ") == 1, "the line about the cells covers the summary"
    assert run(words) == 0
    assert run(["wandb", "sync", "out", "--mode", "offline"]) == 0
    assert "wandb: 3 there already" in capsys.readouterr().out
    assert len(list((tmp_path / "out" / "wandb").glob("offline-run-*"))) == 3


@pytest.mark.long
def test_a_failing_cell_ends_with_one_and_the_others_are_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "conf" / "policy").mkdir(parents=True)
    (tmp_path / "conf" / "policy" / "broken.yaml").write_text("_target_: broken_on_import.Broken\n")
    (tmp_path / "broken_on_import.py").write_text(
        "from dataclasses import dataclass\nfrom kvbench import ScorePolicy\n\n\n"
        "@dataclass(frozen=True, kw_only=True)\nclass Broken(ScorePolicy):\n"
        "    def score(self, view):\n        raise ZeroDivisionError('on purpose')\n"
    )
    words = ["task=perplexity", "dataset.num_samples=1", "sink=console", "results=out"]
    assert run(["--config-dir", "conf", "-m", "policy=broken,full", *words]) == 1
    found = bodies(tmp_path / "out")
    assert {name: body["status"] for name, body in found.items()} == {"broken": "crash", "full": "ok"}
    assert found["broken"]["phase"] == "perplexity"
    assert "on purpose" in found["broken"]["error"]["traceback"]
    assert "1 of 2 cells failed" in capsys.readouterr().out


def test_results_that_cannot_be_written_are_told_in_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("not a folder")
    words = ["policy=h2o", "task=memory", "task.memory.new_tokens=2", "dataset.num_samples=1", "sink=console"]
    assert run([*words, "results=file"]) == 2
    printed = capfd.readouterr().err
    assert printed.startswith("kvbench: results is 'file', but file is not a folder; choose a folder")
    assert printed.count("\n") == 1


def test_the_composed_configuration_can_be_printed(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["--cfg", "job", "policy=streaming_llm"]) == 0
    assert "_target_: kvbench.policies.streaming_llm.StreamingLLM" in capfd.readouterr().out


def test_the_printed_configuration_of_an_experiment_says_what_is_swept(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["+experiment=paper_ppl", "policy=full", "--cfg", "job"]) == 0
    printed = capfd.readouterr().out
    assert "_target_: kvbench.tasks.perplexity.PerplexityReleased" in printed
    assert "# swept: budget.fraction=1.0,0.9,0.8,0.7,0.6,0.5,0.4,0.3,0.2" in printed


@pytest.mark.cover("one")
@pytest.mark.parametrize("flag", [["--config-dir", "conf"], ["--config-dir=conf"], ["-cd", "conf"], ["-cd=conf"]])
def test_the_configuration_is_printed_with_a_folder_of_ones_own(
    flag: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "conf" / "policy").mkdir(parents=True)
    (tmp_path / "conf" / "policy" / "mine.yaml").write_text("_target_: mine.Mine\n")
    assert run([*flag, "--cfg", "job", "policy=mine", "--package", "policy"]) == 0
    assert capfd.readouterr().out == "# @package policy\n_target_: mine.Mine\n"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["-m", "policy=full,h2o", "--cfg", "job"], "--multirun and --cfg exclude each other"),
        (["--run", "--info"], "--run and --info exclude each other"),
        (["--resolve"], "--resolve says how --cfg prints"),
        (["-p", "policy"], "--package says how --cfg prints"),
        (["--cfg", "nonsense"], "--cfg is 'nonsense'; known: all, hydra, job"),
        (["policy", "h2o"], "policy h2o cannot be read as KEY=VALUE; did you mean 'policy=h2o'?"),
        (["policy:h2o"], "did you mean 'policy=h2o'?"),
        (["--info", "nonsense"], "--info is 'nonsense'; known: all, config, "),
        (["--cfg", "job", "--package", "nosuch"], "package 'nosuch' not found in config"),
        (["--cfg", "job", "--resolve", "+x=${nosuch}"], "Interpolation key 'nosuch' not found"),
        (["--cfg", "job", "policy=full,h2o"], "Ambiguous value"),
        (["--config-dir=nosuch", "--cfg", "job"], "nosuch is no folder"),
        (["--config-name=mine", "--cfg", "job"], "--config-name is 'mine', but no folder has mine.yaml"),
        (["-cp", "conf", "policy=h2o"], "--config-path is not supported"),
        (["--experimental-rerun", "x.pickle"], "--experimental-rerun is not supported"),
        (["--shell-completion"], "--shell-completion needs one of install=bash"),
        (["-sc", "install=tcsh"], "it got 'install=tcsh'"),
    ],
)
def test_a_flag_of_hydras_that_can_not_be_followed_is_refused_in_one_line(
    words: list[str], reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(words) == 2
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("kvbench: ")
    assert printed.err.count("\n") == 1
    assert reason in printed.err


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["--info", "defaults", "policy=h2o"], "policy/h2o"),
        (["-i", "searchpath"], "pkg://kvbench.conf"),
        (["--cfg", "hydra", "-p", "hydra.run"], "dir: ${results}"),
        (["--cfg=job", "--resolve", "results=there", "-p", "results"], "there"),
        (["--hydra-help"], "== Flags =="),
        (["-sc", "install=bash"], "hydra_bash_completion()"),
    ],
)
def test_what_hydra_prints_is_printed_and_nothing_runs(
    words: list[str], shown: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    logging.getLogger("hydra").setLevel(logging.NOTSET)  # a sweep before, in the same process, silences it
    assert run(words) == 0
    assert shown in capfd.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_shell_completes_names_of_ones_own_group(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COMP_LINE", "kvbench policy=streaming")
    monkeypatch.setattr(sys, "argv", ["kvbench"])
    assert run(["-sc", "query=bash"]) == 0
    assert capfd.readouterr().out.split() == ["policy=streaming_llm", "policy=streaming_llm_released"]


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["policy=h2o"], ["report"]])
def test_a_checkout_that_is_not_installed_says_so_in_one_line(words: list[str]) -> None:
    """Python without its site-packages sees the files of the checkout and nothing that was installed."""
    command = [sys.executable, "-S", "-m", "kvbench", *words]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("kvbench: kvbench is not installed in this Python")
    assert "python -m pip install -e ." in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_version_that_records_name_needs_an_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("kvbench.version", nothing)
    with pytest.raises(ConfigError, match="is not installed in this Python"):
        inputs_digest(Path("results"))


def test_flags_are_read_wherever_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def noting(overrides: list[str], *, multirun: bool, config_dir: str | None, config_name: str) -> Any:
        asked.append((overrides, multirun, config_dir))
        raise ConfigError("seen")

    monkeypatch.setattr("kvbench.config.compose.compose_grid", noting)
    for words in itertools.permutations(["policy=full,random", "-m", "sink=console"]):
        assert run(list(words)) == 2
    assert {(*sorted(overrides), multirun) for overrides, multirun, _ in asked} == {
        ("policy=full,random", "sink=console", True)
    }


@pytest.mark.long
def test_flags_may_come_after_settings(tmp_path: Path) -> None:
    words = ["task=perplexity", "dataset.num_samples=1", "sink=console", "results=out"]
    assert run(["policy=full,random", "-m", *words]) == 0
    assert set(bodies(tmp_path / "out")) == {"full", "random"}


def test_no_bar_starts_a_thread_that_wakes_up_beside_what_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Bar(tqdm):  # type: ignore[type-arg]
        """Has a monitor of its own, as others may have started one in this process."""

        monitor = None

    monkeypatch.setattr(tqdm, "monitor_interval", 10)
    quiet_libraries()
    with Bar(total=1, file=io.StringIO()):
        assert Bar.monitor is None
