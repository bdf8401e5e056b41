"""Parts of a policy in yaml and on the command line: built, named, in the key where they are set and nowhere else."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from kvbench.cache import Room
from kvbench.cache.parts import layer_entries
from kvbench.config.build import build_cell
from kvbench.config.compose import compose_grid
from kvbench.errors import ConfigError
from kvbench.policies.allocation.pyramid import Pyramid
from kvbench.policies.merge.nearest_cosine import NearestCosine
from kvbench.sweep.cell import Cell

PARTS = {"allocation", "merge", "every_tokens", "skip_layers", "protect"}


def cell_of(*words: str, config_dir: str | None = None) -> Cell:
    (composed,) = compose_grid(["task=perplexity", *words], multirun=False, config_dir=config_dir)
    return build_cell(composed)


def policy_key(*words: str) -> dict[str, Any]:
    key: dict[str, Any] = cell_of(*words).settings["policy"]
    return key


@pytest.mark.parametrize("policy", ["h2o", "snapkv", "random", "streaming_llm"])
def test_a_part_that_is_not_set_is_in_no_key(policy: str) -> None:
    assert not PARTS & policy_key(f"policy={policy}").keys()


def test_a_part_is_in_the_key_with_its_settings_its_class_and_its_source() -> None:
    plain, divided = policy_key("policy=h2o"), policy_key("policy=h2o", "+policy/allocation=pyramid")
    part = divided.pop("allocation")
    assert divided == plain
    assert (part["beta"], part["class"]) == (20, "kvbench:Pyramid")
    assert re.fullmatch("[0-9a-f]{16}", part["source"])
    json.dumps(part)


def test_uniform_is_no_allocation() -> None:
    assert policy_key("policy=h2o", "+policy/allocation=uniform") == policy_key("policy=h2o")
    assert policy_key("policy=pyramidkv", "+policy/allocation=uniform") == policy_key("policy=snapkv")


def test_what_an_allocation_makes_an_outcome_is_labelled() -> None:
    words = ("policy=streaming_llm", "+policy/allocation=lazy_layers")
    assert cell_of(*words).labels["budget_total"] == "data_dependent"
    assert "budget_total" not in cell_of("policy=h2o", "+policy/allocation=cake").labels


def test_each_setting_of_a_part_makes_another_cell() -> None:
    words = ("policy=h2o", "+policy/allocation=pyramid")
    keys = {
        cell_of("policy=h2o").key,
        cell_of(*words).key,
        cell_of(*words, "policy.allocation.beta=5").key,
        cell_of(*words, "+policy/merge=nearest_cosine").key,
        cell_of(*words, "+policy/merge=nearest_cosine", "policy.merge.how=average").key,
        cell_of("policy=h2o", "+policy.every_tokens=8").key,
        cell_of("policy=h2o", "+policy.skip_layers=[0]").key,
        cell_of("policy=h2o", "+policy.protect=picture").key,
    }
    assert len(keys) == 8


def test_a_yaml_that_names_its_parts_is_the_score_with_them_on_the_command_line() -> None:
    named, composed = cell_of("policy=pyramidkv"), cell_of("policy=snapkv", "+policy/allocation=pyramid")
    assert named.key == composed.key
    assert (named.labels["policy"], composed.labels["policy"]) == ("pyramidkv", "snapkv+pyramid")
    assert getattr(named.setting.policy, "allocation", None) == Pyramid()


def test_parts_are_built_as_typed_frozen_settings() -> None:
    words = ("+policy/merge=nearest_cosine", "policy.merge.threshold=0", "+policy.skip_layers=[0,-1]")
    policy = cell_of("policy=h2o", *words).setting.policy
    assert getattr(policy, "merge", None) == NearestCosine(threshold=0.0)
    assert getattr(policy, "skip_layers", None) == (0, -1)
    assert isinstance(hash(policy), int)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["+policy/allocation=pyramids"], "policy/allocation is 'pyramids'; did you mean 'pyramid'"),
        (["+policy.allocation=pyramid"], r"is 'pyramid'; it must be an Allocation.*\+policy/allocation=NAME"),
        (["+policy/allocation=pyramid", "policy.allocation.beta=0"], "policy.allocation.beta is 0"),
        (["+policy/allocation=pyramid", "policy.allocation.beta=x"], "allocation.beta is 'x'; it must be a whole"),
        (["+policy/allocation=pyramid", "+policy.allocation.gamma=1"], "allocation.gamma is no setting of Pyramid"),
        (["+policy/merge=voronoi", "policy.merge._target_=kvbench.policies.h2o.H2O"], "must derive from Merge"),
        (["+policy.skip_layers=0"], "policy.skip_layers is 0; it must be a list, of each a whole number"),
        (["+policy.protect=texts"], "policy.protect is 'texts'; it must be one of"),
        (["+policy.every_tokens=0"], "policy.every_tokens is 0"),
        (["policy=snapkv", "+policy.every_tokens=4"], "SnapKV cuts the prompt only"),
        (["policy=full", "+policy/allocation=pyramid"], "policy.allocation is no setting of Full"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_part_is_told_in_one_line(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as told:
        cell_of("policy=h2o", *words)
    assert "\n" not in str(told.value)


def test_parts_of_ones_own_need_a_folder_and_two_yamls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_parts.py").write_text(
        "from dataclasses import dataclass\n\nfrom kvbench.cache import Allocation, Merge, Plan\n\n\n"
        "@dataclass(frozen=True, kw_only=True)\nclass Even(Allocation):\n    share: float = 0.5\n\n\n"
        "@dataclass(frozen=True, kw_only=True)\nclass Drop(Merge):\n"
        "    def into(self, view, keep, protected):\n        return Plan(keep=keep)\n"
    )
    for group, kind, settings in (("allocation", "Even", "share: 0.5\n"), ("merge", "Drop", "")):
        (tmp_path / "conf" / "policy" / group).mkdir(parents=True)
        (tmp_path / "conf" / "policy" / group / "mine.yaml").write_text(f"_target_: my_parts.{kind}\n{settings}")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    words = ("policy=h2o", "+policy/allocation=mine", "+policy/merge=mine")
    cell = cell_of(*words, "policy.allocation.share=0.25", config_dir=str(tmp_path / "conf"))
    sys.modules.pop("my_parts", None)
    key = cell.settings["policy"]
    assert (key["allocation"]["class"], key["merge"]["class"]) == ("Even", "Drop")
    assert key["allocation"]["share"] == 0.25
    assert cell.labels["policy"] == "h2o+mine+mine"


def test_the_pages_example_of_an_allocation_keeps_its_word() -> None:
    page = (Path(__file__).parents[2] / "docs" / "policies.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    made: dict[str, Any] = {}
    exec(compile(block, "policies.md", "exec"), made)
    for budget in range(2, 20):
        room = Room(num_layers=4, num_heads=2, budget=budget, tokens=20, protected=2)
        assert sum(layer_entries(made["FirstLayers"](), (), room)) == 4 * budget
