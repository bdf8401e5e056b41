"""The terms of the contract in plain Python: which policies, which budgets, how many entries a head may hold."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kvbench.cache import UNLIMITED, Budget, Policy, PolicyCache, ScorePolicy, View, When
from kvbench.cache.policy import steps_between_cuts
from kvbench.cache.released import departures_of
from kvbench.policies.allocation.ada import Ada
from kvbench.policies.allocation.pyramid import Pyramid
from tests.covering import POSITIONS as POSITIONS
from tests.covering import YAMLS as YAMLS
from tests.driving import Held, drive
from tests.tiny_models import random_tokens, tiny_model

BUDGETS = ("one", "smallest", "below_smallest", "tokens", "third_of_seen", "third_of_prompt")
PROMPT, STEPS = 24, 10
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@dataclass(frozen=True, kw_only=True)
class MiddleFirst(ScorePolicy):
    """No published method: it wants to lose exactly what it promises to keep, and its scores tie."""

    num_sinks: int = 2
    num_recent: int = 3
    recent_fraction: float = 0.25

    def score(self, view: View) -> Tensor:
        return -((view.position - view.seen[:, None, None] // 2).abs() // 2).float()


def middle_first(name: str) -> MiddleFirst:
    """It alone, with its layers or heads divided, or planned in blocks."""
    parts: dict[str, dict[str, Any]] = {
        "middle_first": {},
        "divided": {"allocation": Pyramid(beta=4)},
        "blocks": {"every_tokens": 4},
        "ragged": {"allocation": Ada(alpha=0.1)},
        "ragged_blocks": {"allocation": Ada(), "every_tokens": 3},
    }
    return MiddleFirst(**parts[name])


def budget_named(name: str, policy: Policy) -> Budget:
    smallest = policy.smallest_budget_tokens
    return {
        "one": Budget(tokens=1),
        "smallest": Budget(tokens=smallest),
        "below_smallest": Budget(tokens=max(1, smallest - 1)),
        "tokens": Budget(tokens=9),
        "third_of_seen": Budget(fraction=0.3),
        "third_of_prompt": Budget(fraction=0.3, of="prompt"),
        "unlimited": UNLIMITED,
    }[name]


def is_divided(policy: Policy) -> bool:
    """Whether layers or heads are given different numbers, whose sum is what counts."""
    return isinstance(policy, ScorePolicy) and (policy.allocation is not None or bool(policy.skip_layers))


def is_outcome(policy: Policy) -> bool:
    """Whether how much is held is an outcome that no budget bounds."""
    parts = policy.allocation if isinstance(policy, ScorePolicy) else None
    return parts is not None and parts.total == "data_dependent"


def block(policy: Policy, step: int) -> int:
    """Entries that a policy which plans in blocks may hold beyond its budget after a decode step."""
    return (steps_between_cuts(policy) or 1) - 1 if step else 0


def allowed(policy: Policy, budget: Budget, prompt: int, seen: int, kept_of_prompt: int) -> int:
    """Entries a head may hold, from the words of the contract and in exact arithmetic."""
    if not policy.bounded or is_outcome(policy):
        return seen
    if seen > prompt and When.DECODE not in policy.when:
        return kept_of_prompt + seen - prompt
    base = seen if budget.of == "seen" else prompt
    entries = budget.tokens or max(1, math.floor(Fraction(str(budget.fraction)) * base))
    if departures_of(policy).counts_as_released and budget.fraction is not None:
        # rounded up, in floating point, from what is pruned
        entries = max(1, math.ceil(base * (1 - round(1 - budget.fraction, 6))))
    if When.PREFILL not in policy.when:
        return max(entries, prompt)
    return entries


@cache
def merges(policy: Policy) -> bool:
    """Whether the policy merges entries: by a part, or seen from the stored keys of a prompt over budget."""
    if isinstance(policy, ScorePolicy) and policy.merge is not None:
        return True
    model, tokens = tiny_model("llama_gqa"), random_tokens(3, 1, PROMPT)
    full = drive(model, PolicyCache(model, policy), tokens, PROMPT).cache
    cut = drive(model, PolicyCache(model, policy, Budget(tokens=5)), tokens, PROMPT).cache
    whole, left = full.policy_layers[0].slots, cut.policy_layers[0].slots
    assert whole is not None
    assert left is not None
    held = left.entries.position[0, 0].clamp(min=0)
    same = left.entries.keys[0, 0] == whole.entries.keys[0, 0][held]
    return not bool(same.all(dim=-1)[left.entries.position[0, 0] >= 0].all())


def cells(held: Held) -> list[tuple[int, ...]]:
    return [head for layer in held for row in layer for head in row]


def left_padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    length = max(len(row) for row in rows)
    tokens = torch.zeros(len(rows), length, dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for index, row in enumerate(rows):
        tokens[index, length - len(row) :] = row
        mask[index, length - len(row) :] = 1
    return tokens, mask
