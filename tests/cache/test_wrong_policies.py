"""A policy that breaks its contract is told how."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from kvbench.cache import (
    Allocation,
    Budget,
    Merge,
    Needs,
    Plan,
    Policy,
    PolicyCache,
    Room,
    ScorePolicy,
    View,
    cache_argument,
)
from kvbench.cache.selection import keep_top, lowest
from kvbench.cache.view import ReadOnly
from kvbench.contract.driving import drive
from kvbench.errors import ConfigError, NonFiniteChoiceError, NonFiniteError, PolicyError
from kvbench.kernels.dispatch import kernels_forced
from kvbench.policies.allocation.d2o import D2O
from kvbench.policies.h2o import H2O
from kvbench.policies.released.h2o_elastic import H2OElasticRelease
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


def own(view: View) -> Tensor:
    return torch.arange(view.position.shape[-1]).expand_as(view.position)


def merging(view: View, into: int) -> Plan:
    return Plan(keep=first(view, 5), merge_into=torch.full_like(view.position, into))


WRONG_POLICIES: dict[str, tuple[Policy, str]] = {
    "score that is NaN": (Scored(function=lambda v: v.position.float() * torch.nan), "NaN"),
    "score that is not there": (Scored(function=lambda v: None), "score returned None; it must be a tensor"),  # type: ignore[arg-type, return-value]
    "score without heads": (Scored(function=lambda v: v.position[:, 0].float()), "shape"),
    "score per query head": (Scored(function=lambda v: v.position.float().repeat(1, 2, 1)), "shape"),
    "score of one entry": (Scored(function=lambda v: v.position.float()[..., :1]), "shape"),
    "score of too few entries": (Scored(function=lambda v: v.position.float()[..., :-1]), "shape"),
    "score of an undeclared statistic": (Scored(function=lambda v: v.mass), "MASS"),
    "plan that is none": (
        Planned(function=lambda v: first(v, 5)),
        "returned a tensor of bool and shape .*; it must be a Plan",
    ),  # type: ignore[arg-type, return-value]
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
    "merge of what is not there": (
        Planned(function=lambda v: Plan(keep=first(v, 5), merge_into=own(v), merge_source=own(v) + 7)),
        "merge_source from 7 to .*; allowed: 0 to",
    ),
    "merge of what stands before": (
        Planned(function=lambda v: Plan(keep=first(v, 5), merge_into=own(v), merge_source=own(v) - 2)),
        "merge_source from -2 to .*; allowed: 0 to",
    ),
    "merge of floats": (
        Planned(function=lambda v: Plan(keep=first(v, 5), merge_into=own(v), merge_source=own(v).float())),
        "merge_source.*int64",
    ),
    "source of no merge": (
        Planned(function=lambda v: Plan(keep=first(v, 5), merge_source=own(v))),
        "merge_source without a merge_into",
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


def test_of_two_layers_that_go_wrong_the_first_is_told(tiny_llama: Any) -> None:
    late, soon = Plan, lambda **_: None  # too many is noted, none at all is seen at once
    policy = Planned(function=lambda v: (soon if v.layer else late)(keep=first(v, 6)))
    with pytest.raises(PolicyError, match="plan in layer 0 keeps"):
        drive(tiny_llama, PolicyCache(tiny_llama, policy, Budget(tokens=5)), random_tokens(0, 2, 12), 12)


def test_what_is_held_is_known_of_a_prompt_that_was_refused(tiny_llama: Any) -> None:
    policy = Planned(function=lambda v: Plan(keep=first(v, 6 if v.layer else 2)))
    cache = PolicyCache(tiny_llama, policy, Budget(tokens=5))
    with pytest.raises(PolicyError, match="plan in layer 1 keeps"):
        drive(tiny_llama, cache, random_tokens(0, 2, 12), 12)
    for layer in cache.policy_layers:
        assert layer.ledger.held == layer.slots.length.amax(dim=1).tolist()


@dataclass(frozen=True, kw_only=True)
class Divided(Allocation):
    """Answers whatever it was given."""

    answer: Callable[..., Any]

    def layers(self, room: Room, told: Sequence[Tensor]) -> Any:
        return self.answer(room)


@dataclass(frozen=True, kw_only=True)
class Told(Divided):
    waits: ClassVar[bool] = True

    def tell(self, view: View, ranking: Tensor) -> Any:
        return self.answer(view)


@dataclass(frozen=True, kw_only=True)
class Headed(Allocation):
    ragged: ClassVar[bool] = True

    answer: Callable[..., Any]

    def heads(self, view: View, candidates: Tensor, free: Tensor) -> Any:
        return self.answer(free)


@dataclass(frozen=True, kw_only=True)
class Merged(Merge):
    at_decode: ClassVar[bool] = True

    answer: Callable[..., Any]
    joined: Callable[..., Any] = lambda view: None

    def into(self, view: View, keep: Tensor, protected: Tensor) -> Any:
        return self.answer(keep)

    def joining(self, view: View, victim: Tensor) -> Any:
        return self.joined(view)


WRONG_PARTS: dict[str, tuple[Allocation | Merge, str]] = {
    "layers of nothing": (
        Divided(answer=lambda room: None),
        r"Divided.layers returned None; it must be 2 whole numbers",
    ),
    "layers of floats": (
        Divided(answer=lambda room: [5.0, 5.0]),
        r"Divided.layers returned \[5.0, 5.0\]; it must be 2 whole numbers from 1 to 12",
    ),
    "layers of a tensor": (
        Divided(answer=lambda room: torch.tensor([5, 5])),
        "Divided.layers returned a tensor of int64 and shape",
    ),
    "nothing told": (
        Told(answer=lambda view: None),
        r"Told.tell returned None; it must be a tensor \(B, N\) = \(2, N\)",
    ),
    "told of no row": (
        Told(answer=lambda view: view.keys.sum()),
        r"Told.tell returned a tensor of float32 and shape \(\); it must be a tensor \(B, N\) = \(2, N\)",
    ),
    "heads of nothing": (
        Headed(answer=lambda free: None),
        r"Headed.heads returned None; it must be int64 of shape \(B, H\)",
    ),
    "heads of floats": (
        Headed(answer=lambda free: free.double()[:, None] / 2 * torch.ones(2)),
        r"Headed.heads returned a tensor of float64 and shape \(2, 2\); it must be int64 of shape \(B, H\) = \(2, 2\)",
    ),
    "merge of nothing": (Merged(answer=lambda keep: None), "Merged.into returned None; it must be a Plan"),
    "merge of a mask": (
        Merged(answer=lambda keep: keep),
        "Merged.into returned a tensor of bool and shape .*; it must be a Plan",
    ),
    "joining of nothing": (
        Merged(answer=lambda keep: Plan(keep=keep)),
        "Merged.joining returned None; it must be a Joining",
    ),
}


@pytest.mark.parametrize("name", WRONG_PARTS)
def test_a_wrong_answer_of_a_part_is_told_as_the_parts(tiny_llama: Any, name: str) -> None:
    part, message = WRONG_PARTS[name]
    parts: Any = {"merge" if isinstance(part, Merge) else "allocation": part}
    cache = PolicyCache(tiny_llama, H2O(**parts), Budget(tokens=5))
    mask = torch.tensor([[1] * 13, [0] * 3 + [1] * 10])
    with pytest.raises(PolicyError, match=message) as told:
        drive(tiny_llama, cache, random_tokens(0, 2, 13), 12, mask)
    assert "\n" not in str(told.value)


WRITES: dict[str, tuple[Callable[[View], object], str]] = {
    "in place": (lambda view: view.keys.mul_(1.0), "view.keys is changed in layer 0: .* by mul_; work on a copy"),
    "through a part of it": (lambda view: view.values[:, :1].zero_(), "view.values is changed"),
    "by an index": (lambda view: view.mass.__setitem__((..., 0), 9.0), "view.mass is changed"),
    "by a mask": (lambda view: view.position.masked_fill_(view.position < 0, 0), "view.position is changed"),
    "as an output": (lambda view: torch.add(view.mass, 1, out=view.mass), "view.mass is changed .* by add"),
    "of the counts": (lambda view: view.budget.add_(1), "view.budget is changed"),
}


@pytest.mark.parametrize("inference", [True, False], ids=["inference", "no_grad"])
@pytest.mark.parametrize("at", ["plan", "victim"])
@pytest.mark.parametrize("how", WRITES)
@pytest.mark.parametrize("own_plan", [False, True])
def test_what_a_policy_writes_into_its_view_is_refused(
    tiny_llama: Any, own_plan: bool, how: str, at: str, inference: bool
) -> None:
    write, message = WRITES[how]

    @dataclass(frozen=True, kw_only=True)
    class Writing(ScorePolicy):
        needs: ClassVar[Needs] = Needs.MASS

        def score(self, view: View) -> Tensor:
            if view.prefill == (at == "plan"):
                write(view)
            return view.mass

        def plan(self, view: View) -> Plan:
            if not own_plan:
                return super().plan(view)
            if at == "plan":
                write(view)
            return Plan(keep=first(view, 5))

    if not own_plan:
        del Writing.plan
    for _ in range(2):  # the next cell of the same process is told as well
        with pytest.raises(PolicyError, match=message), torch.inference_mode(inference):
            drive(tiny_llama, PolicyCache(tiny_llama, Writing(), Budget(tokens=5)), random_tokens(0, 1, 9), 7)


def test_what_is_written_is_looked_at_once_for_each_class_and_copies_may_be_written(
    tiny_llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Copying(ScorePolicy):
        def score(self, view: View) -> Tensor:
            return view.position.float().clone().mul_(2).masked_fill_(~view.valid, 0)

    looked: list[str] = []
    enter = ReadOnly.__enter__
    monkeypatch.setattr(ReadOnly, "__enter__", lambda self: looked.append(self._asked) or enter(self))
    for _ in range(2):
        drive(tiny_llama, PolicyCache(tiny_llama, Copying(), Budget(tokens=5)), random_tokens(0, 1, 12), 7)
    assert looked == ["Copying.plan", "Copying.victim"], "of two layers, two prompts and ten steps"


@dataclass(frozen=True, kw_only=True)
class Exactly(Allocation):
    total = "exactly"  # type: ignore[assignment]


def test_a_total_that_no_allocation_may_have_is_refused(tiny_llama: Any) -> None:
    with pytest.raises(ConfigError, match=r"Exactly.total is 'exactly'; did you mean 'exact'\?"):
        PolicyCache(tiny_llama, H2O(allocation=Exactly()), Budget(tokens=5))


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
    function: Callable[[View], Tensor] = lambda view: view.window.sum(dim=2)

    def score(self, view: View) -> Tensor:
        return self.function(view)


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


def nan_at(where: Callable[[View], Tensor]) -> Scored:
    """Scores by age, NaN where `where` says so, at decode only."""
    return Scored(
        num_sinks=1, function=lambda v: torch.where(where(v) & (not v.prefill), torch.nan, v.position.float())
    )


NAN_AT_DECODE: dict[str, Policy] = {
    "everywhere": nan_at(lambda v: v.valid),
    "one entry of one head of one row": nan_at(
        lambda v: (v.position == v.seen.amax() - 2) & (torch.tensor([[[0], [1]], [[0], [0]]]) == 1)
    ),
    "by a victim of its own": Planned(
        function=lambda v: Plan(keep=first(v, 5)), chosen=lambda v: lowest(v.position * torch.nan, v.position)
    ),
}


@pytest.mark.parametrize("name", NAN_AT_DECODE)
def test_nan_that_decides_at_decode_is_found_at_once_on_a_cpu(tiny_llama: Any, name: str) -> None:
    cache = PolicyCache(tiny_llama, NAN_AT_DECODE[name], Budget(tokens=5))
    with pytest.raises(PolicyError, match="NaN at decode in layer 0") as raised:
        drive(tiny_llama, cache, random_tokens(0, 2, 12), 10)
    assert isinstance(raised.value, NonFiniteError), "so the cell ends as nonfinite"


@pytest.mark.long
@pytest.mark.cover("one")
@pytest.mark.parametrize("name", list(NAN_AT_DECODE)[1:])
def test_nan_that_decides_in_kernels_is_noted_and_told_when_asked(tiny_llama: Any, name: str) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    cache = PolicyCache(tiny_llama, NAN_AT_DECODE[name], Budget(tokens=5))
    with kernels_forced(True):
        drive(tiny_llama, cache, random_tokens(0, 2, 11), 10)
        tiny_llama(random_tokens(1, 2, 3), **cache_argument(tiny_llama, cache))
    with pytest.raises(NonFiniteChoiceError, match="NaN at decode in layer 0"):
        cache.check()


@pytest.mark.parametrize("by_kernels", [False, pytest.param(True, marks=pytest.mark.long)])
def test_nan_that_decides_nothing_and_infinite_scores_are_no_fault(tiny_llama: Any, by_kernels: bool) -> None:
    """What is protected has no say; infinity is a number like others, below and above all of them."""

    def score(view: View) -> Tensor:
        wild = (
            view.position.float().masked_fill(view.position == 3, -torch.inf).masked_fill(view.position == 4, torch.inf)
        )
        return wild.masked_fill(view.position == 0, torch.nan).masked_fill(~view.valid, torch.nan)

    if by_kernels:
        pytest.importorskip("triton", reason="triton is not installed")
    cache = PolicyCache(tiny_llama, Scored(num_sinks=1, function=score), Budget(tokens=5), reserve_tokens=20)
    with kernels_forced(by_kernels):
        trace = drive(tiny_llama, cache, random_tokens(0, 1, 8), 5)
    cache.check()
    assert [held[0][0][0] for held in trace.held] == [
        (0, 1, 2, 3, 4),
        (0, 1, 2, 4, 5),
        (0, 2, 4, 5, 6),
        (0, 4, 5, 6, 7),
    ]


@pytest.mark.few(1)
@pytest.mark.parametrize("slot", [-7, 5, 99])
def test_a_victim_beyond_the_entries_is_told_by_both_paths_and_nothing_is_written_there(
    tiny_llama: Any, slot: int
) -> None:
    policy = Planned(function=lambda v: Plan(keep=first(v, 4)), chosen=lambda v: v.position[..., 0] * 0 + slot)
    for by_kernels in (False, True) if find_spec("triton") else (False,):
        cache = PolicyCache(tiny_llama, policy, Budget(tokens=4), reserve_tokens=4)
        with kernels_forced(by_kernels), pytest.raises(PolicyError, match="holds no token"):
            _ = drive(tiny_llama, cache, random_tokens(0, 1, 9), 8), cache.check()


def test_attention_that_is_nan_is_the_models_fault_whatever_a_policy_makes_of_it(tiny_llama: Any) -> None:
    model = copy.deepcopy(tiny_llama)
    model.model.layers[1].self_attn.k_proj.weight.data[3] = torch.nan
    by_window = Windowed(
        function=lambda v: v.window.sum(dim=2)
    )  # scores, and so is looked at when the prompt is through
    for policy in (H2O(), H2O(allocation=D2O()), H2OElasticRelease(one_set_for_the_model=False), by_window):
        with pytest.raises(NonFiniteError, match="is NaN in layer 1"):
            drive(model, PolicyCache(model, policy, Budget(tokens=5)), random_tokens(0, 1, 9), 9)


def test_a_plan_of_nan_is_refused(tiny_llama: Any) -> None:
    by_keep_top = Planned(function=lambda v: Plan(keep=keep_top(v.position * torch.nan, v.position, v.budget)))
    with pytest.raises(PolicyError, match="keep_top keeps none where a score is NaN"):
        drive(tiny_llama, PolicyCache(tiny_llama, by_keep_top, Budget(tokens=5)), random_tokens(0, 1, 9), 9)
    with pytest.raises(NonFiniteChoiceError, match="mass that is NaN"):
        drive(tiny_llama, PolicyCache(tiny_llama, MassOfNan(), Budget(tokens=5)), random_tokens(0, 1, 9), 9)


@dataclass(frozen=True, kw_only=True)
class MassOfNan(Policy):
    """Leaves NaN to the entries that stay."""

    needs: ClassVar[Needs] = Needs.MASS

    def plan(self, view: View) -> Plan:
        return Plan(keep=first(view, 5), mass=view.mass * torch.nan)


@dataclass(frozen=True, kw_only=True)
class OddOnes(ScorePolicy):
    """Protects by a rule of its own: as many of the first tokens as `first_tokens`, and no others."""

    first_tokens: int = 3
    wrong: bool = False

    def score(self, view: View) -> Tensor:
        return view.position.float()

    def protected_range(self, seen: Tensor, budget: Tensor) -> tuple[Tensor, Tensor]:
        first_tokens = torch.full_like(seen, self.first_tokens)
        return (first_tokens[:1] if self.wrong else first_tokens), seen


@pytest.mark.parametrize("by_kernels", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_protected_range_of_ones_own_counts_at_prompt_and_decode_alike(tiny_llama: Any, by_kernels: bool) -> None:
    if by_kernels:
        pytest.importorskip("triton", reason="triton is not installed")
    with kernels_forced(by_kernels):
        trace = drive(tiny_llama, PolicyCache(tiny_llama, OddOnes(), Budget(tokens=5)), random_tokens(0, 1, 10), 9)
        assert [held[1][0][1] for held in trace.held] == [(0, 1, 2, last - 1, last) for last in (8, 9)]
        with pytest.raises(PolicyError, match=r"protected_range returned .* \(1,\)"):
            drive(tiny_llama, PolicyCache(tiny_llama, OddOnes(wrong=True), Budget(tokens=5)), random_tokens(0, 2, 9), 9)
