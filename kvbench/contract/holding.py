"""Rules of what is decided and what is then held.

Decided by a policy's own scores and alike each time, changing nothing and waiting for nothing; held never more than the
budget and all of it, nothing twice, what is protected, in real bytes.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import math
import weakref
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from kvbench.cache import UNLIMITED, Allocation, Budget, Merge, Plan, Policy, PolicyCache, ScorePolicy, View, When
from kvbench.cache import layer as cache_layer
from kvbench.cache.artefact import Artefact
from kvbench.cache.layer import PolicyLayer
from kvbench.cache.policy import is_divided, total_of
from kvbench.cache.slots import Entries
from kvbench.contract.driving import Held, drive, random_tokens, storage_bytes, tensors_of, tiny_model
from kvbench.contract.terms import (
    BUDGETS,
    CLOSE,
    POSITIONS,
    PROMPT,
    ROUNDED,
    STEPS,
    advised,
    allowed,
    block,
    budget_named,
    cells,
    demand,
    no_score_policy,
    no_total,
    protected_counts,
    rule,
    same,
    unbounded,
)


@rule(
    "it is a frozen dataclass that can be compared, and so are its parts",
    "one object serves every layer, sequence and run, and has a key",
)
def is_frozen(policy: Policy) -> None:
    """Raise BrokenRuleError for what can be changed, or is not a dataclass."""
    kind = type(policy)
    parts = [getattr(policy, name, None) for name in ("allocation", "merge")]
    for one in (kind, *(type(part) for part in parts if isinstance(part, Allocation | Merge))):
        settings = vars(one).get("__dataclass_params__")  # not those of a base
        demand(
            settings is not None and settings.frozen,
            f"{one.__name__} is no frozen dataclass; write @dataclass(frozen=True)",
        )
    demand(
        hash(policy) == hash(twin := copy.copy(policy)) and policy == twin,
        f"two {kind.__name__} of the same settings are not equal",
    )


def _held_by(policy: Policy, budget: str, positions: Any) -> list[Held]:
    """Return what is held after a prompt and after each step; four rules look at it, so it is driven once."""
    try:
        hash(policy)
    except TypeError:  # another rule says so
        return _drive_anew(policy, budget, positions)
    return _drive_once(policy, budget, positions)


def _drive_anew(policy: Policy, budget: str, positions: Any) -> list[Held]:
    model = tiny_model("llama_gqa")
    cache = PolicyCache(model, policy, budget_named(budget, policy), positions=positions)
    trace = drive(model, cache, random_tokens(4, 1, PROMPT + STEPS), PROMPT)
    demand(all(bool(torch.isfinite(step).all()) for step in trace.logits), "the model's logits are NaN or infinite")
    return trace.held


_drive_once = lru_cache(maxsize=32)(_drive_anew)


@rule(
    "no layer or head ever holds more than the budget",
    "the budget is what policies are compared by",
    budget=BUDGETS,
    positions=POSITIONS,
)
def holds_its_budget(policy: Policy, *, budget: str, positions: Any) -> None:
    """Raise BrokenRuleError for a step after which more is held, or nothing, or where logits are no numbers."""
    given, trace = budget_named(budget, policy), _held_by(policy, budget, positions)
    kept_of_prompt = cells(trace[0])
    for step, held in enumerate(trace):
        most = [
            allowed(policy, given, PROMPT, PROMPT + step, len(kept)) + block(policy, step) for kept in kept_of_prompt
        ]
        sizes = [len(head) for head in cells(held)]
        told = f"{step} steps after a prompt of {PROMPT} tokens the heads hold {sizes} entries; allowed are {most}"
        demand(all(sizes) and sum(sizes) <= sum(most), told)
        demand(is_divided(policy) or all(size <= one for size, one in zip(sizes, most, strict=True)), told)


@rule(
    "a score policy uses its whole budget",
    "who holds less is not worse, it was given less",
    budget=BUDGETS,
    positions=POSITIONS,
    spares=no_total,
)
def uses_its_budget(policy: Policy, *, budget: str, positions: Any) -> None:
    """Raise BrokenRuleError where fewer entries are held than the budget allows, or not the total of the allocation."""
    given, before = budget_named(budget, policy), PROMPT
    for step, held in enumerate(_held_by(policy, budget, positions)):
        most = allowed(policy, given, PROMPT, PROMPT + step, before)
        before = before + 1 if step and before + 1 - most <= block(policy, step) else min(before + (step > 0), most)
        sizes = [len(head) for head in cells(held)]
        told = f"{step} steps after the prompt the heads hold {sizes} entries, where each is given {before}"
        demand(is_divided(policy) or set(sizes) == {before}, told)
        most_in_all = before * len(sizes)
        demand(sum(sizes) == most_in_all or (total_of(policy) == "bounded" and sum(sizes) < most_in_all), told)


def undivided(policy: Policy) -> str | None:
    """Spare policies whose layers all hold the same."""
    return None if is_divided(policy) else "its layers and heads all hold the same"


@rule(
    "every layer holds what the allocation gave it, then and later",
    "a share that is not carried out makes every allocation the uniform one",
    budget=(Budget(tokens=48), Budget(fraction=0.5), Budget(fraction=0.5, of="prompt")),
    spares=undivided,
)
def holds_its_share(policy: Policy, *, budget: Budget) -> None:
    """Raise BrokenRuleError where a layer's heads hold more or less on average than its share of the budget."""
    given: list[Sequence[int]] = []
    divide: Any = vars(cache_layer)["layer_entries"]

    def noted(*args: Any, **kwargs: Any) -> Any:
        given.append(divide(*args, **kwargs))
        return given[-1]

    model, prompt = tiny_model("llama_gqa"), 96  # so long that something is left beside a window of 32
    with mock.patch.object(cache_layer, "layer_entries", noted):
        trace = drive(model, PolicyCache(model, policy, budget), random_tokens(4, 1, prompt + STEPS), prompt)
    share = list(given[-1])
    uniform, expected = budget.entries(seen_tokens=prompt, prompt_tokens=prompt), share
    for step, held in enumerate(trace.held):
        if step and When.DECODE not in policy.when:
            expected = [own + step for own in share]
        elif step:
            if block(policy, step):
                return  # between two cuts more is held
            more = budget.entries(seen_tokens=prompt + step, prompt_tokens=prompt) - uniform
            expected = [min(now + 1, max(1, own + more)) for now, own in zip(expected, share, strict=True)]
        found = [sum(len(head) for head in of_layer[0]) / len(of_layer[0]) for of_layer in held]
        told = f"{step} steps after the prompt layers hold {found} entries a head; their shares are {expected}"
        demand(found == expected, told)


@rule(
    "prompts may be shorter or longer than the budget",
    "nothing is cut before the budget is full, and the step that fills it still sees all",
    prompt=(1, 8, 9, 10, 36),
    positions=POSITIONS,
)
def takes_any_prompt(policy: Policy, *, prompt: int, positions: Any) -> None:
    """Raise BrokenRuleError where a prompt of another length is cut too early, or holds too much."""
    model, budget, tokens = tiny_model("llama_mha"), Budget(tokens=9), random_tokens(4, 1, prompt + STEPS)
    trace = drive(model, PolicyCache(model, policy, budget, positions=positions), tokens, prompt)
    compared = tokens[:, : max(prompt, 10)]  # the step of the tenth token is the last that can say the same
    whole = drive(model, PolicyCache(model, policy, UNLIMITED, positions=positions), compared, prompt)
    kept = [len(head) for head in cells(trace.held[0])]
    for step, held in enumerate(trace.held):
        most = allowed(policy, budget, prompt, prompt + step, math.ceil(sum(kept) / len(kept))) + block(policy, step)
        sizes = [len(head) for head in cells(held)]
        told = f"{step} steps after a prompt of {prompt} tokens the heads hold {sizes} entries; allowed are {most}"
        demand(sum(sizes) <= most * len(sizes) and (is_divided(policy) or max(sizes) <= most), told)
        if prompt + step <= 9:
            demand(held == whole.held[step], f"after {prompt + step} tokens something is gone, with a budget of 9")
    demand(
        torch.equal(trace.prompt_logits, whole.prompt_logits), "the prompt's own logits differ from the full cache's"
    )
    for step in range(1, 10 - prompt + 1):  # the step of the tenth token still sees all ten
        same(trace.logits[step - 1], whole.logits[step - 1], CLOSE, f"logits of step {step}, before anything is gone,")


@rule(
    "what was evicted never returns, and nothing is held twice",
    "an entry that is dropped is really gone",
    budget=BUDGETS,
    positions=POSITIONS,
)
def never_brings_back(policy: Policy, *, budget: str, positions: Any) -> None:
    """Raise BrokenRuleError for positions that come back or occur twice."""
    trace = _held_by(policy, budget, positions)
    before = [tuple(range(PROMPT))] * len(cells(trace[0]))
    for step, held in enumerate(trace):
        for now, then in zip(cells(held), before, strict=True):
            demand(len(set(now)) == len(now), f"{step} steps after the prompt a head holds a position twice: {now}")
            new = set(now) - {*then, PROMPT + step - 1}
            demand(not new, f"{step} steps after the prompt a head holds positions {sorted(new)} again")
        before = cells(held)


@rule(
    "sinks and recent tokens stay as the policy promises",
    "what is declared as protected is protected",
    budget=BUDGETS,
    positions=POSITIONS,
    spares=no_score_policy,
)
def keeps_what_it_protects(policy: Policy, *, budget: str, positions: Any) -> None:
    """Raise BrokenRuleError where a sink or a token of the recent window is gone."""
    assert isinstance(policy, ScorePolicy)
    given, trace = budget_named(budget, policy), _held_by(policy, budget, positions)
    kept_of_prompt = min(len(head) for head in cells(trace[0]))
    first = allowed(policy, given, PROMPT, PROMPT, kept_of_prompt)
    for step, held in enumerate(trace):
        cut_at = PROMPT + step if When.DECODE in policy.when else PROMPT  # what came after the last cut all stays
        for layer in held:
            size = allowed(policy, given, PROMPT, cut_at, kept_of_prompt)
            if is_divided(policy):  # a layer's own budget, which its heads share
                size = min(size, sum(len(head) for head in layer[0]) // len(layer[0]))
            sinks, recent = protected_counts(policy, size)
            for head in layer[0]:
                # A budget that grew has room for sinks that are gone.
                missing = {*range(min(sinks, first - 1)), *range(max(0, cut_at - recent), PROMPT + step)} - set(head)
                demand(not missing, f"{step} steps after the prompt a head lacks protected positions {sorted(missing)}")


def _learnt(artefact: Artefact | None) -> list[Tensor]:
    return [] if artefact is None else [one for layer in artefact.layers for one in layer.values()]


@rule(
    "bytes are really freed",
    "a mask over a full buffer saves nothing",
    reserve=(0, STEPS),
    positions=POSITIONS,
    spares=unbounded,
)
def frees_bytes(policy: Policy, *, reserve: int, positions: Any) -> None:
    """Raise BrokenRuleError where tensors are larger than what is held, or views of larger ones."""
    model, prompt, budget = tiny_model("llama_gqa"), 240, 12
    cache = PolicyCache(model, policy, Budget(tokens=budget), positions=positions, reserve_tokens=reserve)
    trace = drive(model, cache, random_tokens(7, 1, prompt + STEPS), prompt)
    slot_bytes = 2 * 2 * 8 * 4  # key and value, KV heads, head size, float32
    heads = [len(head) for held in trace.held for head in cells(held)]
    full_bytes = 2 * slot_bytes * (prompt + STEPS)
    slack = block(policy, 1) + (0 if reserve or When.DECODE in policy.when else 64)
    stored, most = cache.occupancy().stored_bytes, 2 * slot_bytes * (max(heads) + 1 + slack)
    demand(
        stored <= most,
        f"keys and values take {stored:,} bytes where {max(heads)} entries a head are held; at most {most:,}",
    )
    learnt = [one for layer in cache.policy_layers[:1] for one in _learnt(layer.setup.artefact)]
    # What a policy reads of the model's weights, and has learnt of it, is no part of a cache.
    weights = {weight.untyped_storage().data_ptr() for weight in (*model.parameters(), *learnt)}
    tensors = [tensor for tensor in tensors_of(cache) if tensor.untyped_storage().data_ptr() not in weights]
    reached = storage_bytes(tensors) - sum(layer.ring_bytes for layer in cache.policy_layers)
    demand(
        stored <= reached < full_bytes / 4 + 2 * slot_bytes * slack,
        f"the cache reaches {reached:,} bytes, a full one of {prompt + STEPS} tokens {full_bytes:,}",
    )
    larger = [t for t in tensors if t.untyped_storage().nbytes() != t.numel() * t.element_size()]
    demand(not larger, f"{len(larger)} tensors of the cache are views of larger ones, which stay alive")
    if is_divided(policy):
        held = sum(len(head) for head in cells(trace.held[-1]))
        spare = 4 * (2 + slack)  # of 2 layers with 2 heads: a free slot, and one for rounding up
        demand(
            stored <= slot_bytes // 2 * (held + spare), f"keys and values take {stored:,} bytes for {held} entries held"
        )


@rule("nothing keeps the prompt alive", "only one layer's prompt is ever held uncompressed", positions=POSITIONS)
def lets_the_prompt_go(policy: Policy, *, positions: Any) -> None:
    """Raise BrokenRuleError where a prompt's keys or values are still reachable."""
    model, storages = tiny_model("llama_gqa"), list[weakref.ref[Any]]()
    update = PolicyLayer.update

    def noting_update(layer: PolicyLayer, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        storages.extend(weakref.ref(states.untyped_storage()) for states in (keys, values))
        return update(layer, keys, values, *args, **kwargs)

    with mock.patch.object(PolicyLayer, "update", noting_update):
        cache = PolicyCache(model, policy, Budget(tokens=6), positions=positions)
        drive(model, cache, random_tokens(8, 1, PROMPT), PROMPT)
    if any(storage() is not None for storage in storages):
        gc.collect()  # of cycles that hold a prompt
    alive = sum(storage() is not None for storage in storages)
    demand(len(storages) >= 4 and not alive, f"{alive} of {len(storages)} keys and values are still reachable")


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
