"""A bench over the bundled model and a few scenes, and cells around it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvbench.cache import Budget, Needs, Plan, Policy, ScorePolicy, View
from kvbench.datasets.base import Dataset
from kvbench.datasets.scenes import Scenes
from kvbench.models.loader import LoadedModel
from kvbench.models.spec import ModelSpec
from kvbench.sweep.cell import Cell
from kvbench.tasks.decode import CacheSetting
from kvbench.tasks.task import Bench, FullAnswers, Task

SCENES = Scenes(num_samples=3)


@dataclass(frozen=True, kw_only=True)
class KeepAll(Policy):
    bounded = False


@dataclass(frozen=True, kw_only=True)
class MostAttended(ScorePolicy):
    needs = Needs.MASS
    recent_fraction: float = 0.5

    def score(self, view: View) -> Tensor:
        return view.mass


@dataclass(frozen=True, kw_only=True)
class NotANumber(ScorePolicy):
    """What it keeps is fine, but the values go on as NaN."""

    def score(self, view: View) -> Tensor:
        return view.position.float()

    def plan(self, view: View) -> Plan | None:
        plan = super().plan(view)
        assert plan is not None
        return replace(plan, values=torch.full_like(view.values, torch.nan))


@dataclass(frozen=True, kw_only=True)
class NanAtDecode(ScorePolicy):
    """Plans the prompt by age, and has no number to decide by while tokens are generated; the cache stays as it is."""

    def score(self, view: View) -> Tensor:
        return view.position.float() if view.prefill else view.position * torch.nan


FULL = CacheSetting(policy=KeepAll(), budget=Budget(fraction=1.0), positions="original")


def cut(budget: Budget | None = None, policy: Policy | None = None) -> CacheSetting:
    return CacheSetting(policy=policy or MostAttended(), budget=budget or Budget(fraction=0.2), positions="original")


def bench_of(loaded: LoadedModel, folder: Path, setting: CacheSetting, *, batch_size: int = 2) -> Bench:
    return Bench(
        loaded=loaded,
        dataset=SCENES,
        examples=SCENES.examples(),
        setting=setting,
        full_policy=KeepAll(),
        answers=FullAnswers(folder=folder / "full_answers", settings={"model": "bundled"}),
        batch_size=batch_size,
        advance=lambda share: None,
    )


def cell_of(
    tasks: Mapping[str, Task],
    *,
    dataset: Dataset = SCENES,
    model: ModelSpec | None = None,
    setting: CacheSetting = FULL,
    **settings: Any,
) -> Cell:
    shared = {"model": "m", "dataset": "d", "query_visible": True, "batch_size": 2, "device": "cpu", "versions": {}}
    shared["cache_semantics"] = 1
    return Cell(
        settings={**shared, "tasks": sorted(tasks), **settings},
        labels={"model": "m", "dataset": "d", "policy": "p", "budget": "-", "positions": "original"},
        model=model or ModelSpec(checkpoint="bundled"),
        dataset=dataset,
        setting=setting,
        full_policy=KeepAll(),
        tasks=tasks,
        batch_size=2,
        seed=0,
        device="cpu",
    )
