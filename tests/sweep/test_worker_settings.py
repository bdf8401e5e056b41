from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvbench.errors import ConfigError
from kvbench.sweep import supervisor as workers
from kvbench.sweep.process import gpu_slots
from kvbench.sweep.supervisor import Ticket, WorkerSettings, slots_of
from kvbench.tasks.perplexity import Perplexity
from kvbench.tasks.speed import Speed
from tests.tasks.benches import cell_of


def tickets(*models: str, device: str = "cpu", asked: str = "auto") -> list[Ticket]:
    cells = [replace(cell_of({}, model_name=m, number=n), device=device) for n, m in enumerate(models)]
    named = [replace(c, settings={**c.settings, "model": m}) for c, m in zip(cells, models, strict=True)]
    return [Ticket(cell=cell, spec={"config": {"device": asked}, "choices": {}}) for cell in named]


def sizes(settings: WorkerSettings, given: list[Ticket]) -> list[list[str]]:
    return [[str(t.cell.settings["model"]) for t in group] for group in settings.groups(given)]


def test_cells_of_one_model_and_data_set_are_a_group() -> None:
    assert sizes(WorkerSettings(), tickets("a", "b", "a")) == [["a", "a"], ["b"]]
    assert sizes(WorkerSettings(isolation="cell"), tickets("a", "b", "a")) == [["a"], ["a"], ["b"]]
    assert sizes(WorkerSettings(group_cells=2), tickets(*"aaaaa")) == [["a", "a"], ["a", "a"], ["a"]]


def test_every_gpu_gets_a_share_with_device_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_num_gpus", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert sizes(WorkerSettings(), tickets(*"aaaaa", device="cuda:0")) == [["a"] * 3, ["a"] * 2]
    assert sizes(WorkerSettings(), tickets(*"aabb", device="cuda:0")) == [["a"] * 2, ["b"] * 2]
    assert slots_of(tickets("a", device="cuda:0"), {}) == [{"CUDA_VISIBLE_DEVICES": n} for n in "01"]
    assert slots_of(tickets("a", device="cuda:0", asked="cuda:0"), {}) == [{}]
    assert slots_of(tickets("a", device="cpu"), {}) == [{}]
    assert WorkerSettings(group_cells=3).most_claims(tickets("a", device="cuda:0")) == 6
    assert WorkerSettings().most_claims(tickets("a")) is None


def test_a_model_over_several_gpus_has_one_worker_that_sees_them_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_num_gpus", lambda: 2)
    given = tickets(*"aab", device="cuda:0")
    wide = [replace(one, cell=replace(one.cell, model=replace(one.cell.model, devices=(0, 1)))) for one in given]
    assert slots_of(wide, {}) == slots_of([given[0], wide[1]], {}) == [{}]
    assert sizes(WorkerSettings(), wide) == [["a", "a"], ["b"]]


def test_a_gpu_keeps_the_name_it_was_given_under() -> None:
    assert gpu_slots(2, "5,7") == [{"CUDA_VISIBLE_DEVICES": "5"}, {"CUDA_VISIBLE_DEVICES": "7"}]
    assert gpu_slots(1, "5") == [{}]
    assert gpu_slots(0, None) == [{}]


def test_processes_begin_beside_cells_only_where_nothing_is_timed_and_a_gpu_computes() -> None:
    def begins_early(given: list[Ticket]) -> bool:
        return WorkerSettings().plan(given, results=Path("r"), sweep="s").begins_early

    given = tickets("a", "b", device="cuda:0", asked="cuda:0")
    quality: list[Ticket] = [replace(one, cell=replace(one.cell, tasks={"perplexity": Perplexity()})) for one in given]
    timed = replace(given[0], cell=replace(given[0].cell, tasks={"perplexity": Perplexity(), "speed": Speed()}))
    assert begins_early(quality)
    assert not begins_early([*quality, timed]), "its cells are timed beside nothing, whichever comes first"
    assert not begins_early([replace(quality[0], cell=replace(quality[0].cell, device="cpu"))])


def test_a_plan_takes_over_every_setting() -> None:
    settings = WorkerSettings(timeout_s=5.0, silence_s=None, num_retries=3, share_prompts=False)
    plan = settings.plan(tickets("a"), results=Path("r"), sweep="s")
    assert (plan.limits.timeout_s, plan.limits.silence_s, plan.num_retries, plan.share_prompts) == (5.0, None, 3, False)


@pytest.mark.parametrize(
    "wrong",
    [
        {"isolation": "process"},
        {"timeout_s": 0.0},
        {"silence_s": -1.0},
        {"timeout_s": float("nan")},
        {"num_retries": -1},
        {"group_cells": 0},
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"worker.{next(iter(wrong))} is"):
        WorkerSettings(**wrong)
