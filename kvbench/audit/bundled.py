"""What the policies and data sets of kvbench itself are, so that a label alone cannot rename them.

Names of classes are read from the configuration as text, so that no class is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Literal

from kvbench.audit.evidence import Cell, class_at, class_of

_TARGET = re.compile(r"^_target_:\s*(\S+)", re.MULTILINE)
_CUTS_THE_PROMPT_ONLY = ("kvbench:SnapKV",)
Group = Literal["policy", "dataset"]


@cache
def targets(group: Group) -> Mapping[str, str]:
    """Return the class of every configuration of a group, by name."""
    texts = {
        file.name.removesuffix(".yaml"): file.read_text(encoding="utf-8")
        for file in files("kvbench.conf").joinpath(group).iterdir()
        if file.name.endswith(".yaml")
    }
    return {name: class_at(found[1]) for name, text in texts.items() if (found := _TARGET.search(text))}


def rule_of(cell: Cell) -> Mapping[str, str]:
    """Return what evicts_at and budget_rounds must say; empty for policies of others and without a budget."""
    policy, budget = cell.setting("policy") or {}, cell.setting("budget")
    if not budget or class_of(policy) not in targets("policy").values():
        return {}
    up = policy.get("target_rounded_up") is True and budget.get("tokens") is None
    prompt_only = class_of(policy) in _CUTS_THE_PROMPT_ONLY
    return {"evicts_at": "prompt" if prompt_only else "prompt and decode", "budget_rounds": "up" if up else "down"}
