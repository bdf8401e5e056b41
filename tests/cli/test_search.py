"""Sweepers and the supervised launcher, as Hydra finds and calls them; what a job returns is its objective."""

from __future__ import annotations

import importlib.util
import json
import math
import pickle
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hydra.core.plugins import Plugins
from hydra.experimental.callback import Callback
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from omegaconf import DictConfig, OmegaConf

import kvbench.config.build as build_module
from kvbench.cli.main import run
from kvbench.cli.sweep import App, Unmeasured
from kvbench.config.build import Shared, build_cell, build_objective
from kvbench.config.compose import Composed, SharingLoader, compose_grid
from kvbench.measures import to_minimise
from kvbench.sweep.cell import Attempt
from kvbench.tasks.task import TaskResult
from tests.covering import one_in
from tests.sweep.test_faults import SHORT, faulty, kvbench

WORDS = ("task=perplexity", "dataset.num_samples=1", "sink=console", "results=out")
FAILS = 0.9


class Each(Sweeper):
    """The least that a sweeper can be: one budget after the other, `num` in a batch."""

    returned: ClassVar[list[Any]] = []

    def __init__(self, budgets: Sequence[float], num: int) -> None:
        self.budgets, self.num = budgets, num

    def setup(self, *, hydra_context: Any, task_function: Any, config: DictConfig) -> None:
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        for at in range(0, len(self.budgets), self.num):
            batch = [[*arguments, f"budget.fraction={budget}"] for budget in self.budgets[at : at + self.num]]
            self.returned.extend(self.launcher.launch(batch, initial_job_idx=at))


Each.__module__ = "hydra_plugins.kvbench_tests"  # where Hydra looks for plugins


class Noting(Callback):
    """Keeps what a job gave back."""

    ended: ClassVar[list[Any]] = []

    def on_job_end(self, config: DictConfig, job_return: Any, **kwargs: Any) -> None:
        self.ended.append((config.hydra.job, job_return))


class Faked:
    """A supervisor that measures nothing: perplexity falls as the budget grows, and the largest ones fail."""

    batches: ClassVar[list[list[float]]] = []

    def __init__(self, plan: Any, events: Any, reserve: Any) -> None:
        self._events = events

    def run(self, groups: Any) -> None:
        tickets = [ticket for group in groups for ticket in group]
        budgets = [ticket.cell.settings["budget"]["fraction"] for ticket in tickets]
        self.batches.append(budgets)
        for ticket, budget in zip(tickets, budgets, strict=True):
            values = {"ppl": 1 / budget, "top1_agreement_fraction": budget}
            made = TaskResult(measurements={name: measured(value) for name, value in values.items()})
            attempt = Attempt(cell=ticket.cell, sweep="single", phase="ppl", status="ok" if budget < FAILS else "oom")
            attempt.error = None if budget < FAILS else {"type": "OutOfMemoryError", "message": "", "traceback": ""}
            self._events.ended(attempt.body({}, made if budget < FAILS else None), True)


def measured(value: float) -> dict[str, Any]:
    return {"value": value, "unit": "", "low": None, "high": None, "n": 1, "method": "faked"}


@pytest.fixture(autouse=True)
def _faked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr("kvbench.sweep.sweep.Supervisor", Faked)
    monkeypatch.setattr("kvbench.cli.main._show_tables", lambda results, keys: None)
    for kind, name in ((Each, "returned"), (Noting, "ended"), (Faked, "batches")):
        monkeypatch.setattr(kind, name, [])
    monkeypatch.setitem(sys.modules, Each.__module__, sys.modules[__name__])
    monkeypatch.setattr("hydra_plugins.kvbench_tests", sys.modules[__name__], raising=False)
    Plugins.instance().register(Each)
    (tmp_path / "conf" / "hydra" / "sweeper").mkdir(parents=True)
    yaml = "_target_: hydra_plugins.kvbench_tests.Each\nbudgets: [0.1, 0.2]\nnum: 2\n"
    (tmp_path / "conf" / "hydra" / "sweeper" / "each.yaml").write_text(yaml)
    return None


def search(*words: str) -> list[Any]:
    """Run a search and return what its jobs returned."""
    assert run(["-m", "--config-dir", "conf", "hydra/sweeper=each", "policy=h2o", *WORDS, *words]) in (0, 1)
    return [one.return_value for one in Each.returned]


def test_the_supervised_launcher_is_found_by_hydra() -> None:
    names = [f"{one.__module__}.{one.__name__}" for one in Plugins.instance().discover(Launcher)]
    assert "hydra_plugins.kvbench_launcher.SupervisedLauncher" in names


def test_a_sweeper_gets_the_objective_of_every_job_of_every_batch() -> None:
    assert search("hydra.sweeper.budgets=[0.5,0.1,0.2,0.25]", "hydra.sweeper.num=3") == [2.0, 10.0, 5.0, 4.0]
    assert Faked.batches == [[0.5, 0.1, 0.2], [0.25]]
    assert [list(one.overrides)[-1] for one in Each.returned] == [f"budget.fraction={b}" for b in (0.5, 0.1, 0.2, 0.25)]
    assert {one.task_name for one in Each.returned} == {"kvbench.cli.sweep".rpartition(".")[2]}
    assert [one.hydra_cfg.hydra.job.num for one in Each.returned] == [0, 1, 2, 3]


def test_a_cell_that_comes_again_is_not_measured_again() -> None:
    assert search("hydra.sweeper.budgets=[0.5,0.5,0.5]") == [2.0] * 3
    assert search("hydra.sweeper.budgets=[0.5,0.25]")[3:] == [2.0, 4.0]
    assert Faked.batches == [[0.5], [0.25]]


def test_where_more_is_better_the_objective_is_negative_so_that_every_search_minimises() -> None:
    words = ("task=quality", "objective=top1_agreement_fraction")
    assert search(*words, "hydra.sweeper.budgets=[0.2,0.5]") == [-0.2, -0.5]
    assert (to_minimise("ppl", 3.0), to_minimise("capacity_prompts", 3.0)) == (3.0, -3.0)


@pytest.mark.parametrize(
    ("ask", "first"),
    [
        ("describe", "objects_recalled_fraction"),
        ("follow_up", "answers_right_fraction"),
        ("both", "objects_recalled_fraction"),
    ],
)
def test_of_a_generation_the_tasks_own_measure_is_the_objective(ask: str, first: str) -> None:
    (composed,) = compose_grid(["task=generation", f"dataset.ask={ask}"], multirun=False, config_dir=None)
    assert build_objective(composed.config, build_cell(composed), is_needed=True) == (first,)


def test_several_objectives_are_returned_together() -> None:
    words = ("task=quality", "objective=[ppl,top1_agreement_fraction]")
    assert search(*words, "hydra.sweeper.budgets=[0.5]") == [(2.0, -0.5)]


def test_a_cell_that_failed_returns_nan_with_its_status_and_the_search_goes_on() -> None:
    found = search("hydra.sweeper.budgets=[0.95,0.5]", "hydra.sweeper.num=1")
    assert math.isnan(found[0])
    assert (found[0].status, found[1]) == ("oom", 2.0)


@pytest.mark.long
def test_a_cell_that_fails_now_does_not_return_what_it_measured_before(monkeypatch: pytest.MonkeyPatch) -> None:
    assert search("hydra.sweeper.budgets=[0.5]") == [2.0]
    monkeypatch.setattr(f"{__name__}.FAILS", 0.4)
    (found,) = search("hydra.sweeper.budgets=[0.5]", "force=true")[1:]
    assert math.isnan(found)


def test_an_unmeasured_objective_is_no_number_to_a_search_and_stays_itself_between_processes() -> None:
    one = pickle.loads(pickle.dumps(Unmeasured("timeout")))
    assert (math.isnan(one), one.status) == (True, "timeout")
    with pytest.raises(ValueError, match="its status is timeout"):
        float(one)


def test_the_app_begins_anew_in_another_process() -> None:
    app = App(is_search=True)
    app.sweep = object()  # type: ignore[assignment]
    copy = pickle.loads(pickle.dumps(app))
    assert (copy.sweep, copy._elsewhere, copy._is_search) == (None, True, True)


UNSEARCHABLE = [
    ("objective=pppl", "objective is 'pppl'; did you mean 'ppl'"),
    ("objective=length_ratio task=generation", "objective is 'length_ratio', of which neither less nor more"),
    (
        "objective=ttft",
        "objective is 'ttft_ms', which task perplexity does not measure here; these are measured: ppl",
    ),
    ("objective=rougeL_released_vs_full task=generation", "which task generation does not measure here"),
    ("objective=needles_f1 task=generation", "measured: objects_recalled_fraction, objects_f1, rougeL_vs_full"),
    ("objective=3", "objective is 3; it must be the name of a measure"),
    ("objective=[]", "objective is []; it must be the name of a measure"),
    ("hydra/sweeper=optna", "hydra/sweeper is 'optna'; did you mean"),
    ("hydra/sweeper=each objective=ttft_ms", "which task perplexity does not measure here"),
    ("hydra/sweeper=each polcy=h2o", "polcy is no setting; did you mean 'policy'"),
    ("hydra/sweeper=each hydra.sweeper.budgets=[0.2,abc]", "budget.fraction is 'abc'"),
    ("hydra/sweeper=odd", "Invalid plugin 'odd.Sweeper'"),
    ("budget.fraction=interval(0.1,0.2)", "has no end of values, so only a search can choose some"),
]


@pytest.mark.parametrize(
    ("words", "reason"),
    [pytest.param(*one.values[0], marks=one.marks) for one in one_in(3, UNSEARCHABLE)],
)
def test_what_cannot_be_searched_is_told_in_one_line_before_anything_runs(
    words: str, reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("conf/hydra/sweeper/odd.yaml").write_text("_target_: odd.Sweeper\n")
    assert run(["-m", "--config-dir", "conf", *WORDS, *words.split()]) == 2
    printed = capfd.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert reason in printed.err
    assert Faked.batches == []


def objective(*words: str, is_needed: bool = False) -> tuple[str, ...]:
    (composed,) = compose_grid(["dataset.num_samples=1", *words], multirun=False, config_dir=None)
    return build_objective(composed.config, build_cell(composed), is_needed=is_needed)


def test_the_objective_is_the_first_measure_of_the_first_task_unless_one_is_named() -> None:
    assert objective() == ("ppl",)
    assert objective("task=generation") == ("objects_recalled_fraction",)
    assert objective("task=speed") == ("ttft_ms",)
    assert objective("objective=kv_stored_bytes") == ("kv_stored_bytes",)


def test_a_sweep_asks_its_data_set_once_for_what_the_objectives_need(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = compose_grid(["policy=h2o", "budget.fraction=0.1,0.2,0.3"], multirun=True, config_dir=None)
    shared, looked = Shared(), list[object]()
    cells = [build_cell(composed, shared) for composed in grid]
    real = build_module._fact_nouns
    monkeypatch.setattr(build_module, "_fact_nouns", lambda dataset: looked.append(dataset) or real(dataset))
    for composed, cell in zip(grid, cells, strict=True):
        assert build_objective(composed.config, cell, shared, is_needed=True) == ("ppl",)
    assert len(looked) == 1, "of all cells and tasks"


def test_a_published_record_holds_what_its_tasks_are_said_to_measure() -> None:
    """So that a search is neither refused a measure nor promised one that never comes."""
    (composed,) = compose_grid(["dataset.num_samples=1"], multirun=False, config_dir=None)
    cell = build_cell(composed)
    said = {name for task in cell.tasks.values() for name in build_module._measured_by(task, cell.dataset) or ()}
    records = sorted((Path(__file__).parents[2] / "results" / "published").glob("**/cells/*/record.json"))
    bodies = [json.loads(path.read_text())["body"] for path in records]
    found = {name for body in bodies if set(body["cell"]["task"]) == set(cell.tasks) for name in body["measurements"]}
    only_there = {"peak_load_bytes", "peak_vision_bytes", "peak_reserved_bytes", "peak_rss_bytes", "peak_settle_bytes"}
    assert found, "the published sweep has all tasks"
    assert said - found <= only_there
    quality = {"ppl", "kl_to_full", "rougeL_vs_full", "objects_f1", "tpot_ms", "tpot_ratio_to_full", "kv_stored_bytes"}
    assert quality <= said


def test_a_plain_sweep_is_one_batch_and_its_jobs_are_told_to_callbacks() -> None:
    words = ["policy=h2o", "budget.fraction=0.2,0.5", f"hydra.callbacks.noting._target_={__name__}.Noting"]
    assert run(["-m", *WORDS, *words[:2], f"+{words[2]}", "hydra.job.name=mine", "hydra.sweep.dir=there"]) == 0
    assert Faked.batches == [[0.2, 0.5]]
    assert [(job.num, job.id, job.name) for job, _ in Noting.ended] == [(0, "mine_0", "mine"), (1, "mine_1", "mine")]
    assert [(one.return_value, one.cfg.budget.fraction) for _, one in Noting.ended] == [(5.0, 0.2), (2.0, 0.5)]
    assert OmegaConf.load("there/multirun.yaml").budget.fraction == 0.2


def test_a_batch_is_at_most_as_large_as_hydra_is_told_and_every_cell_is_checked_before_the_first() -> None:
    words = ["policy=h2o", "hydra.sweeper.max_batch_size=2", *WORDS]
    assert run(["-m", "budget.fraction=0.2,0.3,0.4", *words]) == 0
    assert Faked.batches == [[0.2, 0.3], [0.4]]
    assert run(["-m", "budget.fraction=0.5,0.6,abc", *words]) == 2
    assert Faked.batches == [[0.2, 0.3], [0.4]]


def test_what_was_checked_is_neither_built_nor_composed_nor_copied_again_where_it_is_launched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A sweep of 200 cells would begin three seconds later otherwise."""
    built, made, checked = [], [], []
    real, job, resolved = build_module.build_cell, SharingLoader._job, Composed.resolved
    monkeypatch.setattr(Composed, "resolved", lambda composed: (checked.append(1), resolved(composed))[1])
    monkeypatch.setattr(build_module, "build_cell", lambda *words: (built.append(1), real(*words))[1])
    monkeypatch.setattr(SharingLoader, "_job", lambda loader, words: (made.append(1), job(loader, words))[1])
    monkeypatch.setattr("kvbench.cli.sweep.copied", lambda config: pytest.fail("the cell is known"))
    assert run(["-m", *WORDS, "policy=h2o", "budget.fraction=0.2,0.5,0.6"]) == 0
    assert (len(built), len(made)) == (3, 3)
    assert len(checked) == 3 + 1, "each once, and the first when the batch is launched"


def test_one_cell_is_run_by_hydra_too() -> None:
    noting = f"+hydra.callbacks.noting._target_={__name__}.Noting"
    assert run([*WORDS, "policy=h2o", "budget.fraction=0.25", noting]) == 0
    ((_, returned),) = Noting.ended
    assert returned.return_value == 4.0


def test_a_primary_configuration_of_ones_own_is_composed_as_hydra_documents() -> None:
    Path("conf/mine.yaml").write_text("defaults: [config, _self_]\nsweep: own\nbudget: {fraction: 0.4}\n")
    assert run(["--config-dir", "conf", "--config-name", "mine", "policy=h2o", *WORDS]) == 0
    assert Faked.batches == [[0.4]]
    (record,) = Path("out").glob("cells/*/record.json")
    assert json.loads(record.read_text())["body"]["cell"]["budget"]["fraction"] == 0.4


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("optuna") is None, reason="the extra `sweep` is not installed")
@pytest.mark.parametrize("launcher", ["supervised", "joblib"])
def test_optuna_searches_the_smallest_budget_and_a_failing_cell_does_not_end_it(tmp_path: Path, launcher: str) -> None:
    flags = faulty(tmp_path, bad="fault: raises")
    words = [*flags, "-m", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=4", "hydra.sweeper.n_jobs=2", "results=out"]
    space = ["policy=choice(h2o,bad)", "budget.fraction=range(0.3,0.6,step=0.1)", "hydra.sweeper.sampler.seed=1"]
    done = kvbench(tmp_path, *words, *SHORT, *space, f"hydra/launcher={launcher}")
    assert done.returncode == 1, done.stderr
    assert "cells failed" in done.stdout
    best = OmegaConf.load(tmp_path / "out" / ".hydra" / "optimization_results.yaml")
    bodies = [json.loads(path.read_text())["body"] for path in (tmp_path / "out").glob("cells/*/record.json")]
    values = [body["measurements"]["ppl"]["value"] for body in bodies if body["status"] == "ok"]
    assert len({body["status"] for body in bodies}) == 2, "both policies were tried"
    assert (best.best_params.policy, best.best_value) == ("h2o", min(values))
