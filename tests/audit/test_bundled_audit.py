"""What the audit takes kvbench's own policies for is what their classes are."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvbench.audit.evidence import Cell, class_of, rule_of, targets
from kvbench.cache import Policy, When
from kvbench.cache.released import departures_of

CONF = Path(__file__).parents[2] / "conf"
SAID = {When.BOTH: "prompt and decode", When.PREFILL: "prompt", When.DECODE: "decode"}
NAMES = sorted(path.stem for path in (CONF / "policy").glob("*.yaml"))


def settings_of(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((CONF / "policy" / f"{name}.yaml").read_text(encoding="utf-8"))
    return content


def cell_of(policy: dict[str, Any], budget: dict[str, Any] | None) -> Cell:
    return Cell(body={"cell": {"policy": policy, "budget": budget}}, folder="", attempts=())


@pytest.mark.parametrize("switch", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_the_rule_of_a_policy_is_that_of_its_class(name: str, switch: bool) -> None:
    policy = settings_of(name)
    policy |= {"target_rounded_up": switch} if "target_rounded_up" in policy else {}
    module, _, kind = policy["_target_"].rpartition(".")
    made: Policy = getattr(importlib.import_module(module), kind)(**{k: v for k, v in policy.items() if k[0] != "_"})
    rounds = "up" if departures_of(made).counts_as_released else "down"
    cell = cell_of(policy, {"fraction": 0.2, "tokens": None, "of": "seen"})
    assert rule_of(cell) == {"evicts_at": SAID[made.when], "budget_rounds": rounds}
    cell = cell_of(policy, {"fraction": None, "tokens": 9, "of": "seen"})
    assert rule_of(cell) == {"evicts_at": SAID[made.when], "budget_rounds": "down"}


def test_without_a_budget_and_for_somebody_elses_policy_there_is_no_rule() -> None:
    assert rule_of(cell_of(settings_of("h2o"), None)) == {}
    assert rule_of(cell_of({"_target_": "mine.H2O"}, {"fraction": 0.2, "tokens": None, "of": "seen"})) == {}


def test_the_names_are_those_of_the_configuration() -> None:
    assert targets("policy") == {name: class_of(settings_of(name)) for name in NAMES}
    assert targets("policy")["h2o"] == "kvbench:H2O"
    assert targets("dataset")["scenes"] == "kvbench:Scenes"


@pytest.mark.parametrize("place", ["kvbench.policies.snapkv", "kvbench.gone.since"])
def test_a_record_that_says_where_its_class_lay_is_read_by_the_name_of_the_class(place: str) -> None:
    budget = {"fraction": 0.2, "tokens": None, "of": "seen"}
    for policy in ({"_target_": f"{place}.SnapKV"}, {"class": "kvbench:SnapKV"}):
        assert rule_of(cell_of(policy, budget))["evicts_at"] == "prompt"
    for policy in ({"_target_": "mine.SnapKV"}, {"class": "SnapKV"}):
        assert rule_of(cell_of(policy, budget)) == {}
    assert cell_of({}, None).task("Speed") is None
    for task in ({"_target_": f"{place}.Speed", "n": 1}, {"class": "kvbench:Speed", "n": 1}):
        cell = Cell(body={"cell": {"task": {"timing": task}}}, folder="", attempts=())
        assert cell.task("Speed") == task
