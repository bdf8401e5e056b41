"""Rules of how a policy decides: by its own scores and alike each time, changing nothing and waiting for nothing."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from kvbench.cache import Plan, Policy, PolicyCache, ScorePolicy, View
from kvbench.cache.slots import Entries
from kvbench.contract.driving import drive, random_tokens, tiny_model
from kvbench.contract.terms import (
    POSITIONS,
    PROMPT,
    ROUNDED,
    STEPS,
    advised,
    budget_named,
    demand,
    no_score_policy,
    protected_counts,
    rule,
    same,
)

_ASKED = 8  # decode steps in which a policy is watched: in blocks of four it is asked twice


def protecting_otherwise(policy: Policy) -> str | None:
    """Spare policies that protect by a rule of their own."""
    is_own = isinstance(policy, ScorePolicy) and type(policy).protected_range is not ScorePolicy.protected_range
    return no_score_policy(policy) or ("it protects by a rule of its own" if is_own else None)


@rule(
    "the same input gives the same result, and a used policy is as good as new",
    "a policy holds no state; it draws by view.row_seed",
    budget=("tokens", "third_of_seen"),
    positions=POSITIONS,
)
def repeats_itself(policy: Policy, *, budget: str, positions: Any) -> None:
    """Raise BrokenRuleError where a second run, after another prompt, or a cache that was reset, differs."""
    model, given = tiny_model("llama_gqa"), budget_named(budget, policy)
    tokens, other = random_tokens(9, 1, PROMPT + STEPS), random_tokens(10, 1, 19 + 4)
    first = drive(model, PolicyCache(model, policy, given, positions=positions), tokens, PROMPT)
    used = drive(model, PolicyCache(model, policy, given, positions=positions), other, 19).cache
    used.reset()
    again = drive(model, used, tokens, PROMPT)
    same = first.held == again.held and torch.equal(torch.stack(first.logits), torch.stack(again.logits))
    demand(same, "after another sequence, and a reset of its cache, it keeps other entries of the same tokens")


@rule(
    "it changes nothing that it is shown",
    "a policy decides, and the cache alone acts",
    budget=("tokens", "third_of_seen"),
)
def leaves_its_view_alone(policy: Policy, *, budget: str) -> None:
    """Raise BrokenRuleError where a tensor of the view is another one after the policy was asked."""

    def unchanged(view: View, ask: Callable[[], Any]) -> Any:
        before = {field.name: getattr(view, field.name) for field in dataclasses.fields(view)}
        copies = {name: value.clone() for name, value in before.items() if isinstance(value, Tensor)}
        answer = ask()
        changed = [
            name for name, value in copies.items() if not torch.equal(value.nan_to_num(), before[name].nan_to_num())
        ]
        demand(not changed, f"view.{', view.'.join(changed)} is changed in layer {view.layer}; work on a copy")
        return answer

    with advised(plan=unchanged, victim=unchanged):
        model = tiny_model("llama_gqa")
        cache = PolicyCache(model, policy, budget_named(budget, policy))
        drive(model, cache, random_tokens(4, 1, PROMPT + _ASKED), PROMPT)


_WAITING = {
    "item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__complex__", "__contains__",
    "nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "equal", "allclose", "is_nonzero",
}  # fmt: skip


class _NothingRead(TorchFunctionMode):
    """Inside, a number that is read from a tensor breaks the rule: a GPU would be waited for."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        index = args[1] if name in ("__getitem__", "__setitem__") else ()
        by_mask = any(
            isinstance(one, Tensor) and one.dtype == torch.bool
            for one in (index if isinstance(index, tuple) else (index,))
        )
        demand(
            name not in _WAITING and not (by_mask and name == "__getitem__"),
            f"at a decode step a number is read from a tensor (Tensor.{name}{' by a mask' if by_mask else ''}), which "
            "waits for the device; use torch.where and the like",
        )
        return function(*args, **(kwargs or {}))


@rule(
    "a decode step waits for no number of the device",
    "the graph engine captures the step, and nothing can be read while it does",
    budget=("tokens", "third_of_seen"),
)
def waits_for_nothing(policy: Policy, *, budget: str) -> None:
    """Raise BrokenRuleError where a victim hangs on a number that was read from a tensor."""

    def unread(view: View, ask: Callable[[], Any]) -> Any:
        with _NothingRead():
            return ask()

    with advised(victim=unread):
        model = tiny_model("llama_gqa")
        cache = PolicyCache(model, policy, budget_named(budget, policy))
        drive(model, cache, random_tokens(4, 1, PROMPT + _ASKED), PROMPT)


@rule(
    "what stays is what scores best, and of equals the newer",
    "larger = keep, whoever computes the score",
    budget=("smallest", "tokens", "third_of_seen"),
    spares=protecting_otherwise,
)
def keeps_the_best(policy: Policy, *, budget: str) -> None:
    """Raise BrokenRuleError where a sorted list of its own scores keeps other entries, or frees another one."""
    assert isinstance(policy, ScorePolicy)

    def ranks(view: View) -> dict[tuple[int, int], list[tuple[bool, float, int, int]]]:
        """Slots of each row and head, the first to go first."""
        score = policy.score(view).expand(view.position.shape).tolist()
        found = {}
        for row, heads in enumerate(view.position.tolist()):
            sinks, recent = protected_counts(policy, int(view.budget[row]))
            for head, positions in enumerate(heads):
                held = [(at, slot) for slot, at in enumerate(positions) if at >= 0]
                seen = int(view.seen[row])
                found[row, head] = sorted(
                    (at < sinks or at >= seen - recent, score[row][head][slot], at, slot) for at, slot in held
                )
        return found

    def planned(view: View, ask: Callable[[], Any]) -> Any:
        plan: Plan = ask()
        for (row, head), order in ranks(view).items():
            kept = plan.keep[row, head].nonzero()[:, 0].tolist()
            best = sorted(slot for *_, slot in order[len(order) - len(kept) :])
            demand(kept == best, f"layer {view.layer} keeps slots {kept} of a prompt, and the best are {best}")
        return plan

    def freed(view: View, ask: Callable[[], Any]) -> Any:
        answer: Tensor = ask()
        for (row, head), order in ranks(view).items():
            slot = int(answer[row, head])
            demand(slot == order[0][-1], f"layer {view.layer} frees slot {slot}, and the lowest is {order[0][-1]}")
        return answer

    overridden = type(policy).plan is not ScorePolicy.plan, type(policy).victim is not ScorePolicy.victim
    with advised(plan=None if overridden[0] else planned, victim=None if overridden[1] else freed):
        model = tiny_model("llama_gqa")
        cache = PolicyCache(model, policy, budget_named(budget, policy))
        drive(model, cache, random_tokens(5, 2, PROMPT + STEPS), PROMPT)


@rule(
    "entries are merged as the plan says, and the others stay as they are",
    "what a survivor becomes is arithmetic, and it is done again by hand",
    budget=("tokens", "third_of_seen"),
)
def merges_as_planned(policy: Policy, *, budget: str) -> None:
    """Raise BrokenRuleError where a stored key, value or mass is not what the plan and the prompt's entries give."""
    model, planned = tiny_model("llama_gqa"), {}

    def noted(layer: int, entries: Entries, plan: Plan) -> None:
        planned[layer] = copy.deepcopy((entries, plan))

    cache = PolicyCache(model, policy, budget_named(budget, policy), on_plan=noted)
    drive(model, cache, random_tokens(11, 2, PROMPT), PROMPT)
    for layer, (entries, plan) in planned.items():
        slots = cache.policy_layers[layer].slots
        assert slots is not None
        stored = slots.entries
        for row, head, place in plan.keep.nonzero().tolist():
            at = int(entries.position[row, head, place])
            slot = stored.position[row, head].tolist().index(at) if at in stored.position[row, head].tolist() else None
            demand(slot is not None, f"layer {layer} does not hold position {at}, which its plan keeps")
            for name in ("keys", "values", "mass"):
                if getattr(entries, name) is not None:
                    expected = _bucket(name, entries, plan, row, head, place)
                    same(
                        getattr(stored, name)[row, head, slot],
                        expected,
                        ROUNDED,
                        f"{name} of position {at} in layer {layer}",
                    )


def _bucket(name: str, entries: Entries, plan: Plan, row: int, head: int, place: int) -> Tensor:
    """Return what one survivor becomes, in float64: key or value (D,), or mass ()."""
    given = {"mass": plan.mass, "values": plan.values}.get(name)  # what entries go on with, where the plan says so
    states = (getattr(entries, name) if given is None else given)[row, head].double()
    if (
        plan.merge_into is None
        or (name == "keys" and not plan.merge_keys)
        or (name == "values" and not plan.merge_values)
    ):
        return states[place]
    held = (entries.position[row, head] >= 0).tolist()
    into = plan.merge_into[row, head].tolist()
    members = [one for one in range(len(into)) if held[one] and into[one] == place]
    if name == "mass":
        return torch.stack([states[one] for one in members]).sum(dim=0)
    brought = [states[one if plan.merge_source is None else int(plan.merge_source[row, head, one])] for one in members]
    if plan.merge_weight is None:
        return torch.stack(brought).mean(dim=0)
    weights = plan.merge_weight[row, head].double()
    return torch.stack([weights[one] * state for one, state in zip(members, brought, strict=True)]).sum(dim=0)
