"""`kvbench frontier` on real cells of the bundled model, and its search over records with known truth."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvbench.cli import frontier as frontier_cli
from kvbench.cli.frontier import Plan, asked, cell_of, default_name, search_all, task_words
from kvbench.cli.main import run
from kvbench.config.compose import Composed, compose_grid
from kvbench.errors import ConfigError, RecordError
from kvbench.results.frontier import Frontier, budget_text, load_frontier, save_frontier
from kvbench.results.record import read_record
from kvbench.results.store import verify
from tests.report.synthetic import body, write_cell

LADDER = tuple(number / 16 for number in range(1, 16))


def grids(tmp_path: Path, policies: str = "h2o,elastic") -> tuple[list[Composed], list[Composed]]:
    words = ["task=generation", f"results={tmp_path}"]
    return (
        compose_grid([f"policy={policies}", *words], multirun=True, config_dir=None),
        compose_grid(["policy=full", *words], multirun=True, config_dir=None),
    )


def recorder(tmp_path: Path, loss: Callable[[str, float], float], status: str = "ok") -> tuple[Any, list[str]]:
    """Return a `run` that writes records in which every sample loses about `loss(policy, budget)`, and what it ran."""
    ran: list[str] = []

    def run_cells(grid: Sequence[Composed]) -> None:
        for composed in grid:
            cell = cell_of(composed)
            budget, policy = cell.labels["budget_fraction"], cell.labels["policy"]
            rng = np.random.default_rng(7)
            record = body(policy=policy, budget=budget, num_samples=60, status=status if budget else "ok")
            record["key"] = cell.key
            lost = 0.0 if budget is None else loss(policy, budget)
            for sample in record["samples"]:
                sample["rougeL_vs_full"] = 1.0 - lost * float(rng.uniform(0.5, 1.5)) if lost else 1.0
            if not (tmp_path / "cells" / cell.key[:16]).exists():
                write_cell(tmp_path, record)
            ran.append(f"{policy} {budget}")

    return run_cells, ran


def plan(tmp_path: Path, **changes: Any) -> Plan:
    words = {"name": "f", "measure": "rougeL_vs_full", "margin": 0.1, "ladder": LADDER, "budget_setting": "fraction"}
    return Plan(**(words | {"results": tmp_path} | changes))


def searched(tmp_path: Path, loss: Callable[[str, float], float], **changes: Any) -> tuple[Frontier, list[str]]:
    run_cells, ran = recorder(tmp_path, loss, changes.pop("status", "ok"))
    return search_all(plan(tmp_path, **changes), *grids(tmp_path), run_cells), ran


def test_every_policy_gets_its_own_budget_in_few_cells(tmp_path: Path) -> None:
    found, ran = searched(tmp_path, lambda policy, budget: (0.4 if policy == "h2o" else 0.2) * (1 - budget))
    h2o, elastic = found.searches
    # truth: 0.4 (1 - b) < 0.1 above 75 %, 0.2 (1 - b) < 0.1 above 50 %; at the edge itself nothing can be shown
    assert (h2o.policy, h2o.status, h2o.smallest_safe) == ("h2o", "found", 13 / 16)
    assert (elastic.policy, elastic.smallest_safe) == ("elastic", 9 / 16)
    assert h2o.budget_low is not None
    assert h2o.budget_low <= 13 / 16
    assert len(ran) == len(set(ran)) == found.num_cells <= 1 + 2 * 4
    assert found.num_cells_of_grid == 31
    assert h2o.look is not None
    assert h2o.look.low is not None
    assert h2o.look.low > -0.1
    assert [look.budget for look in h2o.looks] == sorted(look.budget for look in h2o.looks)


def test_a_policy_that_is_never_or_always_safe_says_so(tmp_path: Path) -> None:
    found, _ = searched(tmp_path, lambda policy, budget: 0.5 if policy == "h2o" else 0.01)
    h2o, elastic = found.searches
    assert (h2o.status, h2o.smallest_safe, h2o.budget_low) == ("no budget shown safe", None, None)
    assert (elastic.status, elastic.smallest_safe, elastic.budget_low) == ("every budget is safe", 1 / 16, 1 / 16)


def test_a_larger_budget_that_is_worse_is_named(tmp_path: Path) -> None:
    def loss(policy: str, budget: float) -> float:
        return 0.2 if budget == 0.5 else 0.4 * (1 - budget) + 0.2 * (budget > 0.6) * (budget < 0.9)

    found, _ = searched(tmp_path, loss)
    assert {search.status for search in found.searches} == {"not monotone"}


def test_a_failed_cell_is_not_safe_and_says_why(tmp_path: Path) -> None:
    found, _ = searched(tmp_path, lambda policy, budget: 0.0, status="oom")
    look = found.searches[0].looks[0]
    assert look.outcome == "failed"
    assert "oom" in look.reason
    assert found.searches[0].status == "no budget shown safe"


def test_a_measure_that_the_task_does_not_give_is_refused(tmp_path: Path) -> None:
    run_cells, _ = recorder(tmp_path, lambda policy, budget: 0.1)
    with pytest.raises(ConfigError, match="not measured by this task"):
        search_all(plan(tmp_path, measure="exact_fraction"), *grids(tmp_path), run_cells)


def test_a_full_cache_that_can_not_do_the_task_makes_no_budget_safe(tmp_path: Path) -> None:
    run_cells, _ = recorder(tmp_path, lambda policy, budget: 0.1)

    def run_badly(grid: Sequence[Composed]) -> None:
        run_cells(grid)
        for path in tmp_path.glob("cells/*/record.json"):
            record = read_record(path)
            record["measurements"]["objects_recalled_fraction"] |= {"value": 0.1, "low": 0.02, "high": 0.2}
            path.unlink()
            write_cell(tmp_path, record)

    with pytest.raises(ConfigError, match=r"no budget of tiny-llava on scenes can be called safe: .* 10\.0 % \[2\.0"):
        search_all(plan(tmp_path), *grids(tmp_path), run_badly)


@pytest.mark.long
def test_a_file_is_the_same_bytes_twice_and_reads_back(tmp_path: Path) -> None:
    found, _ = searched(tmp_path, lambda policy, budget: 0.3 * (1 - budget))
    path = save_frontier(tmp_path, found)
    before = path.read_bytes()
    again, _ = searched(tmp_path, lambda policy, budget: 0.3 * (1 - budget))
    assert save_frontier(tmp_path, again).read_bytes() == before
    assert load_frontier(path) == found
    assert [entry.name for entry in path.parent.iterdir()] == ["f.json"]
    assert not [problem for problem in verify(tmp_path).problems if problem.path.startswith("frontier")]
    path.write_bytes(before.replace(b"h2o", b"h20"))
    assert "frontier/f.json" in [problem.path for problem in verify(tmp_path).problems]
    with pytest.raises(RecordError, match="damaged"):
        load_frontier(path)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "no policy is given"),
        (["policy=h2o", "measure=rougL"], "rougeL"),
        (["policy=h2o", "measure=tpot_ms"], "measure is 'tpot_ms'"),
        (["policy=h2o", "margin=x"], "must be a number"),
        (["policy=h2o", "margin=-1"], "at least 1e-06"),
        (["policy=h2o", "margin=1e-7"], "at least 1e-06"),
        (["policy=h2o", "measure=roof_share_fraction"], "measure is 'roof_share_fraction'"),
        (["policy=h2o", "measure=tpot_ratio_to_full"], "measure is 'tpot_ratio_to_full'"),
        (["policy=h2o", "budget=tokens", "ladder=1,inf"], "whole numbers"),
        (["policy=h2o", "ladder=0.5,0.2"], "rising"),
        (["policy=h2o", "ladder=0.5,2"], "at most 1"),
        (["policy=h2o", "budget=tokens"], "ladder=16"),
        (["policy=h2o", "budget=tokens", "ladder=1.5,2"], "whole numbers"),
        (["policy=h2o", "budget.fraction=0.2"], "chooses the budget"),
        (["policy=h2o", "name=../x"], "file name"),
        (["policy=full"], "has no budget"),
        (["policy=h20"], "did you mean"),
        (["--fast", "policy=h2o"], "--fast"),
        (["policy=h2o", "hydra/launcher=joblib"], "launcher"),
    ],
)
def test_a_wrong_word_is_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["frontier", *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", ["ppl", "ppl_released", "kl_to_full", "rougeL_released_vs_full", "exact_fraction"])
def test_a_measure_chooses_the_task_that_gives_it(name: str) -> None:
    assert asked({"measure": name})[0] == name
    composed = compose_grid(["policy=h2o", *task_words(name)], multirun=False, config_dir=None)
    tasks = cell_of(composed[0]).settings["task"]
    given = {"ppl": "perplexity", "ppl_released": "perplexity_released", "kl_to_full": "fidelity"}
    assert list(tasks) == [given.get(name, "generation")]
    assert tasks.get("generation", {}).get("released_rouge", False) == (name == "rougeL_released_vs_full")
    assert task_words("turn2_rougeL_vs_full") == ["task=conversation"]


@pytest.mark.long
def test_a_policy_named_twice_is_searched_and_counted_once(tmp_path: Path) -> None:
    run_cells, ran = recorder(tmp_path, lambda policy, budget: 0.3 * (1 - budget))
    policies, fulls = grids(tmp_path, "h2o,h2o")
    assert len(policies) == 2
    found = search_all(plan(tmp_path), policies, fulls, run_cells)
    assert len(found.searches) == 1
    assert found.num_cells == len(set(ran)) == len(ran)
    assert found.num_cells_of_grid == 1 + len(LADDER)


@pytest.mark.long
def test_a_number_of_tokens_is_no_share_of_them(tmp_path: Path) -> None:
    found, _ = searched(tmp_path, lambda policy, budget: 0.3 * (1 - budget))
    tokens = replace(found, budget_setting="tokens", ladder=(1.0, 16.0))
    assert [budget_text(tokens, budget) for budget in tokens.ladder] == ["1", "16"]
    assert [budget_text(found, budget) for budget in (0.2, 1.0)] == ["20 %", "100 %"]


@pytest.mark.long
def test_another_question_has_a_file_of_its_own_and_the_same_one_has_not() -> None:
    def name(*words: str, ladder: tuple[float, ...] = LADDER, versions: str = "1") -> str:
        grid = compose_grid(["task=generation", *words], multirun=True, config_dir=None)
        cells = [{**cell_of(composed).settings, "versions": versions} for composed in grid]
        return default_name("rougeL_vs_full", 0.1, ladder, cells)

    names = [
        name("policy=h2o"),
        name("policy=elastic"),
        name("policy=h2o,elastic"),
        name("policy=h2o", "dataset.num_samples=64"),
        name("policy=h2o", "budget=tokens", "budget.tokens=32"),
        name("policy=h2o", ladder=(0.1, 0.2)),
    ]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"rougeL_vs_full-0\.1-[0-9a-f]{8}", one) for one in names)
    assert name("policy=h2o,h2o") == name("policy=h2o", versions="2") == names[0]
    assert name("policy=elastic,h2o") == names[2]


def test_help_names_every_word(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["frontier", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"{word}=" in text for word in frontier_cli._OWN)


@pytest.mark.long
def test_a_real_search_goes_on_from_its_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["frontier", "policy=h2o", "ladder=0.2,0.5,0.9", "margin=0.6", "name=real", f"results={tmp_path}"]
    words += ["dataset.num_samples=3", "task.generation.max_new_tokens=160", "sink=console"]
    assert run(words) == 0
    first = capsys.readouterr()
    assert "hardly show" in first.out
    assert "cells instead of 4 of the dense grid" in first.out
    found = load_frontier(tmp_path / "frontier" / "real.json")
    before = (tmp_path / "frontier" / "real.json").read_bytes()
    attempts = sorted(tmp_path.glob("cells/*/attempt-*"))
    assert len(attempts) == found.num_cells == 3
    assert json.loads(before)["body"]["searches"][0]["policy"] == "h2o"
    assert run(words) == 0
    assert (tmp_path / "frontier" / "real.json").read_bytes() == before
    assert sorted(tmp_path.glob("cells/*/attempt-*")) == attempts, "nothing is measured again"
