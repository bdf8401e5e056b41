"""The terms of the contract: which budgets, how many entries a head may hold, and what a rule is.

A rule is a sentence, the reason for it, and a function that raises `BrokenRuleError` with one line. Each is tried in
cases, a product of budgets, position modes and models: tests take the product or a cover of it, `kvbench check-policy`
each value of each of them once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from itertools import cycle, islice
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from kvbench.cache import UNLIMITED, Budget, Plan, Policy, PolicyCache, ScorePolicy, View, When, layer
from kvbench.cache.policy import steps_between_cuts, total_of
from kvbench.cache.released import departures_of
from kvbench.contract.driving import Held, drive, random_tokens, tiny_model

BUDGETS = ("one", "smallest", "below_smallest", "tokens", "third_of_seen", "third_of_prompt")
POSITIONS = ("original", "in_cache", "released")
PROMPT, STEPS = 24, 14
CLOSE = (1e-5, 1e-5)  # relative, absolute
ROUNDED = (1e-5, 3e-5)  # models normalise in float32: 2e-6 to 8e-6 as a rule, seldom 1.5e-5


class BrokenRuleError(AssertionError):
    """A rule that a policy does not keep, in one line."""


Spares = Callable[[Policy], str | None]
"""Says why a rule asks nothing of a policy; None: it does ask."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One rule: its sentence, the reason, what tries it, whom it spares, and the values that its cases are made of."""

    sentence: str
    because: str
    tried: Callable[..., None]
    spares: Spares
    values: Mapping[str, Sequence[Any]]

    @property
    def name(self) -> str:
        """The name of its function."""
        return self.tried.__name__

    def __call__(self, policy: Policy, **case: Any) -> None:
        """Try one case. Raises: BrokenRuleError, and whatever a policy or the cache raises."""
        self.tried(policy, **case)

    def cases(self) -> Iterator[dict[str, Any]]:
        """Yield cases in which each value occurs; where lists differ in length, the shorter go round."""
        number = max((len(values) for values in self.values.values()), default=1)
        rounds = [islice(cycle(values), number) for values in self.values.values()]
        for case in zip(*rounds, strict=True) if rounds else [()]:
            yield dict(zip(self.values, case, strict=True))


def rule(
    sentence: str, because: str, *, spares: Spares = lambda _: None, **values: Sequence[Any]
) -> Callable[[Any], Rule]:
    """Make a function a rule of the contract, tried with `values`."""
    return lambda tried: Rule(sentence=sentence, because=because, tried=tried, spares=spares, values=values)


def no_score_policy(policy: Policy) -> str | None:
    """Spare policies with a plan of their own."""
    return None if isinstance(policy, ScorePolicy) else "it has a plan of its own"


def unbounded(policy: Policy) -> str | None:
    """Spare policies whose total is an outcome."""
    if not policy.bounded:
        return "it ignores the budget"
    return "its allocation's total is an outcome" if total_of(policy) == "data_dependent" else None


def no_total(policy: Policy) -> str | None:
    """Spare policies that may hold less than the budget."""
    why = no_score_policy(policy)
    return why or ("its allocation's total is an outcome" if total_of(policy) == "data_dependent" else None)


def demand(holds: bool, otherwise: str) -> None:
    """Raise BrokenRuleError with the words of `otherwise` unless something holds."""
    if not holds:
        raise BrokenRuleError(otherwise)


def budget_named(name: str, policy: Policy) -> Budget:
    """Return one of `BUDGETS`, `most_of_prompt` or `unlimited`."""
    smallest = policy.smallest_budget_tokens
    return {
        "one": Budget(tokens=1),
        "smallest": Budget(tokens=smallest),
        "below_smallest": Budget(tokens=max(1, smallest - 1)),
        "tokens": Budget(tokens=9),
        "third_of_seen": Budget(fraction=0.3),
        "third_of_prompt": Budget(fraction=0.3, of="prompt"),
        "most_of_prompt": Budget(fraction=0.9, of="prompt"),
        "unlimited": UNLIMITED,
    }[name]


def block(policy: Policy, step: int) -> int:
    """Return the entries that a policy which plans in blocks may hold beyond its budget after a decode step."""
    return (steps_between_cuts(policy) or 1) - 1 if step else 0


def allowed(policy: Policy, budget: Budget, prompt: int, seen: int, kept_of_prompt: int) -> int:
    """Return the entries a head may hold, from the words of the contract and in exact arithmetic."""
    if not policy.bounded or total_of(policy) == "data_dependent":
        return seen
    if seen > prompt and When.DECODE not in policy.when:
        return kept_of_prompt + seen - prompt
    entries = planned(policy, budget, prompt, seen)
    return entries if When.PREFILL in policy.when else max(entries, prompt)


def planned(policy: Policy, budget: Budget, prompt: int, seen: int) -> int:
    """Return the entries a head may hold once a chunk of several tokens was cut."""
    base = seen if budget.of == "seen" else prompt
    if departures_of(policy).counts_as_released and budget.fraction is not None:
        # rounded up, in floating point, from what is pruned
        return max(1, math.ceil(base * (1 - round(1 - budget.fraction, 6))))
    return budget.tokens or max(1, math.floor(Fraction(str(budget.fraction)) * base))


def protected_counts(policy: ScorePolicy, size: int) -> tuple[int, int]:
    """Return how many sinks and recent tokens are kept of `size` entries."""
    sinks = min(policy.num_sinks, size - 1)
    share = math.floor(Fraction(str(policy.recent_fraction)) * size)
    return sinks, min(max(policy.num_recent, share), size - sinks)


@cache
def merges(policy: Policy) -> bool:
    """Return whether the policy merges entries: by a part, or seen from the stored keys of a prompt over budget."""
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
    """Return what each head of each row and layer holds, one after the other."""
    return [head for of_layer in held for row in of_layer for head in row]


Advice = Callable[[View, Callable[[], Any]], Any]
"""Is given a view and the question to the policy, and returns the answer."""


@contextmanager
def advised(*, plan: Advice | None = None, victim: Advice | None = None) -> Iterator[None]:
    """Inside, `plan` and `victim` stand around every question to a policy, at a prompt and at a decode step."""
    with ExitStack() as stack:
        for name, advice in (("checked_plan", plan), ("checked_victim", victim)):
            if advice is not None:
                stack.enter_context(mock.patch.object(layer, name, _around(getattr(layer, name), advice)))
        yield


def _around(question: Callable[..., Plan | Tensor], advice: Advice) -> Callable[..., Any]:
    def asked(policy: Policy, view: View, *rest: Any) -> Any:
        return advice(view, lambda: question(policy, view, *rest))

    return asked


def same(found: Tensor, expected: Tensor, tolerance: tuple[float, float], what: str) -> None:
    """Raise BrokenRuleError where two tensors differ by more than a relative and an absolute tolerance."""
    found, expected = found.double(), expected.double()
    rtol, atol = tolerance
    if not torch.allclose(found, expected, rtol=rtol, atol=atol):
        difference = float((found - expected).abs().nan_to_num(nan=torch.inf).max())
        raise BrokenRuleError(f"{what} differ from what they should be by up to {difference:.3g}")
