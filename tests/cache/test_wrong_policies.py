"""A policy that breaks its contract is told how."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from kvbench.cache import Budget, Needs, Plan, Policy, PolicyCache, ScorePolicy, View
from kvbench.errors import ConfigError, PolicyError
from kvbench.policies.h2o import H2O
from tests.driving import drive
from tests.tiny_models import random_tokens


@dataclass(frozen=True, kw_only=True)
class Scored(ScorePolicy):
    """Scores by any function."""

    function: Callable[[View], Tensor]

    def score(self, view: View) -> Tensor:
        return self.function(view)


@dataclass(frozen=True, kw_only=True)
class Planned(Policy):
    """Plans by any function, and names victims by another."""

    function: Callable[[View], Plan | None]
    chosen: Callable[[View], Tensor] = lambda view: view.position.argmin(dim=-1)

    def plan(self, view: View) -> Plan | None:
        return self.function(view)

    def victim(self, view: View) -> Tensor:
        return self.chosen(view)


def first(view: View, count: int) -> Tensor:
    return (view.position < count) & view.valid


def merging(view: View, into: int) -> Plan:
    return Plan(keep=first(view, 5), merge_into=torch.full_like(view.position, into))


WRONG_POLICIES: dict[str, tuple[Policy, str]] = {
    "score that is NaN": (Scored(function=lambda v: v.position.float() * torch.nan), "NaN"),
    "score without heads": (Scored(function=lambda v: v.position[:, 0].float()), "shape"),
    "score per query head": (Scored(function=lambda v: v.position.float().repeat(1, 2, 1)), "shape"),
    "score of one entry": (Scored(function=lambda v: v.position.float()[..., :1]), "shape"),
    "score of too few entries": (Scored(function=lambda v: v.position.float()[..., :-1]), "shape"),
    "score of an undeclared statistic": (Scored(function=lambda v: v.mass), "MASS"),
    "plan of nothing": (Planned(function=lambda v: None), "None"),
    "plan of too many": (Planned(function=lambda v: Plan(keep=first(v, 6))), "allowed"),
    "plan of none": (Planned(function=lambda v: Plan(keep=first(v, 0))), "allowed"),
    "plan of one head too many": (
        Planned(function=lambda v: Plan(keep=first(v, 5) | (first(v, 6) & torch.tensor([[[True], [False]]])))),
        "allowed",
    ),
    "plan of integers": (Planned(function=lambda v: Plan(keep=first(v, 5).long())), "bool"),
    "plan without heads": (Planned(function=lambda v: Plan(keep=first(v, 5)[:, :1])), "shape"),
    "merge into what is dropped": (Planned(function=lambda v: merging(v, 9)), "does not keep"),
    "merge into what is not there": (Planned(function=lambda v: merging(v, 99)), "allowed"),
    "merge by float": (
        Planned(function=lambda v: Plan(keep=first(v, 5), merge_into=torch.zeros(v.position.shape))),
        "int64",
    ),
    "merge without heads": (
        Planned(function=lambda v: Plan(keep=first(v, 5), merge_into=torch.zeros_like(v.position)[:, :1])),
        "shape",
    ),
    "plan of empty slots": (Planned(function=lambda v: Plan(keep=~v.valid | first(v, 1))), "no token"),
}


@pytest.mark.parametrize("name", WRONG_POLICIES)
def test_a_wrong_plan_is_refused(tiny_llama: Any, name: str) -> None:
    policy, message = WRONG_POLICIES[name]
    cache = PolicyCache(tiny_llama, policy, Budget(tokens=5))
    mask = torch.tensor([[1] * 12, [0] * 3 + [1] * 9])
    with pytest.raises(PolicyError, match=message):
        drive(tiny_llama, cache, random_tokens(0, 2, 12), 12, mask)


@pytest.mark.parametrize(
    "chosen",
    [lambda view: view.position.argmin(dim=-1)[:, :1], lambda view: view.position.argmin(dim=-1).int()],
    ids=["one head", "int32"],
)
def test_a_victim_of_the_wrong_shape_or_type_is_refused(tiny_llama: Any, chosen: Callable[[View], Tensor]) -> None:
    policy = Planned(function=lambda view: Plan(keep=first(view, 5)), chosen=chosen)
    with pytest.raises(PolicyError, match="victim"):
        drive(tiny_llama, PolicyCache(tiny_llama, policy, Budget(tokens=5)), random_tokens(0, 1, 9), 6)


@dataclass(frozen=True, kw_only=True)
class Windowed(ScorePolicy):
    """Reads at decode what only a prompt has."""

    needs: ClassVar[Needs] = Needs.WINDOW

    def score(self, view: View) -> Tensor:
        return view.window.sum(dim=2)


def test_window_rows_read_at_decode_are_refused(tiny_llama: Any) -> None:
    with pytest.raises(PolicyError, match="WINDOW"):
        drive(tiny_llama, PolicyCache(tiny_llama, Windowed(), Budget(tokens=5)), random_tokens(0, 1, 9), 6)


@pytest.mark.parametrize("settings", [{"num_sinks": -1}, {"num_recent": -1}, {"recent_fraction": 1.5}])
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"policy\."):
        H2O(**settings)


def test_an_infinite_score_does_not_outbid_what_is_protected(tiny_llama: Any) -> None:
    policy = Scored(num_sinks=2, function=lambda view: torch.full(view.position.shape, torch.inf))
    trace = drive(tiny_llama, PolicyCache(tiny_llama, policy, Budget(tokens=5)), random_tokens(0, 1, 16), 12)
    assert all(head[:2] == (0, 1) for held in trace.held for layer in held for head in layer[0])


def test_a_victim_that_is_an_empty_slot_is_refused(tiny_llama: Any) -> None:
    policy = Planned(function=lambda v: Plan(keep=first(v, 6)))  # its victim is the lowest position: an empty slot
    cache = PolicyCache(tiny_llama, policy, Budget(fraction=0.5), reserve_tokens=20)
    with pytest.raises(PolicyError, match="holds no token"):
        drive(tiny_llama, cache, random_tokens(3, 1, 20), 12)
