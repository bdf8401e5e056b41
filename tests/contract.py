"""How a test tries a rule of the contract, and a policy made to be hard on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from kvbench.cache import Policy, ScorePolicy, View
from kvbench.cache.policy import total_of
from kvbench.contract import terms
from kvbench.contract.terms import Rule
from kvbench.policies.allocation.ada import Ada
from kvbench.policies.allocation.pyramid import Pyramid

CLOSE = dict(zip(("rtol", "atol"), terms.CLOSE, strict=True))


def is_outcome(policy: Policy) -> bool:
    """Whether how much is held is an outcome that no budget bounds."""
    return total_of(policy) == "data_dependent"


def keep(rule: Rule, policy: Policy, **case: Any) -> None:
    """Try a rule of the contract on a policy, unless it asks nothing of it."""
    if why := rule.spares(policy):
        pytest.skip(why)
    rule(policy, **case)


@dataclass(frozen=True, kw_only=True)
class MiddleFirst(ScorePolicy):
    """No published method: it wants to lose exactly what it promises to keep, and its scores tie."""

    num_sinks: int = 2
    num_recent: int = 3
    recent_fraction: float = 0.25

    def score(self, view: View) -> Tensor:
        return -((view.position - view.seen[:, None, None] // 2).abs() // 2).float()


@dataclass(frozen=True, kw_only=True)
class UnevenHeads(MiddleFirst):
    """One head's scores are worse than another's, so that heads are given different numbers."""

    def score(self, view: View) -> Tensor:
        heads = torch.arange(1, view.position.shape[1] + 1, device=view.position.device)
        return super().score(view) * heads[:, None]


def middle_first(name: str) -> MiddleFirst:
    """It alone, with its layers or heads divided, or planned in blocks."""
    parts: dict[str, dict[str, Any]] = {
        "middle_first": {},
        "divided": {"allocation": Pyramid(beta=4)},
        "blocks": {"every_tokens": 4},
        "ragged": {"allocation": Ada(alpha=0.1)},
        "ragged_blocks": {"allocation": Ada(), "every_tokens": 3},
    }
    kind = UnevenHeads if name.startswith("ragged") else MiddleFirst
    return kind(**parts[name])
