"""What a decode step frees joins others in place: both storages against plain lists, what is refused, who is asked."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvbench.cache import Budget, Joining, Merge, Plan, PolicyCache, View
from kvbench.cache.ragged import RaggedSlots
from kvbench.cache.slots import Slots, settle
from kvbench.contract.driving import drive, left_padded
from kvbench.errors import ConfigError, PolicyError
from kvbench.policies.allocation.ada import Ada
from kvbench.policies.h2o import H2O
from kvbench.policies.merge.cam import CaM
from kvbench.policies.merge.d2o import D2O
from kvbench.policies.merge.nearest_cosine import NearestCosine
from tests.cache.test_ragged import plan_of, ragged
from tests.cache.test_slots import random_entries
from tests.covering import share_of
from tests.tiny_models import random_tokens, tiny_model

PROMPT, STEPS = 20, 16


@settings(max_examples=share_of(80), deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32), length=st.integers(2, 9), most=st.integers(1, 4), keys=st.booleans(), flat=st.booleans()
)
def test_a_victim_joins_others_as_plain_lists_do(seed: int, length: int, most: int, keys: bool, flat: bool) -> None:
    entries = random_entries(seed, length)
    plan = plan_of(entries, merging=False)
    slots = ragged(entries, plan, 1) if flat else settle(entries, plan, length + 1)
    slots.memory = torch.rand(2, 2, 1)
    before, held, memory = copy.deepcopy(slots.entries), slots.length.tolist(), slots.memory.clone()
    over, capacity = torch.rand(2, 2) < 0.7, before.position.shape[-1]
    victim = (torch.rand(2, 2) * slots.length).long()
    into = torch.stack([torch.randperm(capacity)[:most] for _ in range(4)]).view(2, 2, -1)
    weight, own = torch.rand(into.shape), torch.rand(into.shape)
    nothing = (into >= slots.length[..., None]) | (into == victim[..., None]) | (torch.rand(into.shape) < 0.3)
    weight, own = weight.masked_fill(nothing, 0.0), own.masked_fill(nothing, 1.0)
    new_memory = torch.rand(2, 2, 1)
    slots.join(Joining(into=into, weight=weight, own=own, keys=keys, memory=new_memory), victim, over)
    after = slots.entries
    for row in range(2):
        for head in range(2):
            goes = bool(over[row, head])
            expected = [before.keys[row, head].clone(), before.values[row, head].clone()]
            for place, w, o in zip(into[row, head], weight[row, head], own[row, head], strict=True):
                for states, given_states in zip(expected, (before.keys, before.values), strict=True):
                    if goes and (keys or states is expected[1]):
                        gone = given_states[row, head, victim[row, head]]
                        states[place] = o * given_states[row, head, place] + w * gone
            for states, wanted in zip((after.keys, after.values), expected, strict=True):
                inside = slice(0, held[row][head])
                torch.testing.assert_close(states[row, head, inside], wanted[inside])
            assert torch.equal(slots.memory[row, head], (new_memory if goes else memory)[row, head])
    assert slots.length.tolist() == held
    assert torch.equal(after.position, before.position)


@dataclass(frozen=True, kw_only=True)
class Amiss(Merge):
    """Names slots that it must not name."""

    at_decode: ClassVar[bool] = True

    how: str

    def into(self, view: View, keep: Tensor, protected: Tensor) -> Plan:
        return Plan(keep=keep)

    def joining(self, view: View, victim: Tensor) -> Joining:
        gone = victim[..., None]
        into = {
            "itself": gone,
            "twice": torch.where(gone == 0, 1, 0).expand(*victim.shape, 2),
            "beyond": torch.full_like(gone, view.position.shape[-1]),
            "shape": gone[:, :1],
        }[self.how]
        return Joining(into=into, weight=torch.ones(into.shape), own=torch.ones(into.shape))


@pytest.mark.parametrize("how", ["itself", "twice", "beyond", "shape"])
def test_what_joins_no_one_else_is_refused(how: str) -> None:
    model, policy = tiny_model("llama_gqa"), H2O(merge=Amiss(how=how))
    with pytest.raises(PolicyError, match=r"Amiss\.joining .*must be"):
        drive(model, PolicyCache(model, policy, Budget(tokens=6)), random_tokens(3, 1, 12), 9)


@dataclass(frozen=True, kw_only=True)
class Remembers(H2O):
    """Keeps something of its own beside the slots."""

    def remembered(self, view: View) -> Tensor:
        return view.mass


def test_two_that_remember_in_one_place_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"policy\.merge D2O remembers .* and Remembers does so itself"):
        PolicyCache(tiny_model("llama_gqa"), Remembers(merge=D2O()), Budget(tokens=6))
    PolicyCache(tiny_model("llama_gqa"), Remembers(merge=NearestCosine()), Budget(tokens=6))


def test_a_merge_that_is_not_of_steps_is_not_asked_at_any(monkeypatch: pytest.MonkeyPatch) -> None:
    for storage in (Slots, RaggedSlots):
        monkeypatch.setattr(storage, "join", lambda *_: pytest.fail("asked"))
    model, tokens = tiny_model("llama_gqa"), random_tokens(3, 1, PROMPT + 6)
    policies = (H2O(), H2O(merge=NearestCosine()), H2O(merge=D2O(), every_tokens=3))
    for policy in policies:
        drive(model, PolicyCache(model, policy, Budget(tokens=9)), tokens, PROMPT)
    with pytest.raises(pytest.fail.Exception, match="asked"):
        drive(model, PolicyCache(model, H2O(merge=D2O()), Budget(tokens=9)), tokens, PROMPT)


@pytest.mark.parametrize(
    "policy",
    [
        H2O(merge=D2O(), allocation=Ada()),
        H2O(merge=CaM(), allocation=Ada(), num_sinks=1),
        H2O(merge=D2O(), every_tokens=5),
        H2O(merge=D2O(), every_tokens=5, allocation=Ada()),
    ],
    ids=["d2o_ragged", "cam_ragged", "d2o_blocks", "d2o_ragged_blocks"],
)
@pytest.mark.parametrize("budget", [Budget(fraction=0.4), Budget(tokens=12)], ids=str)
def test_merging_steps_are_alike_alone_and_in_a_padded_batch(policy: Any, budget: Budget) -> None:
    """A prompt below its budget too: its first victim then is what the threshold begins with."""
    model = tiny_model("llama_gqa", double=True)
    lengths = (PROMPT, 7)
    rows = [random_tokens(4 + index, length + STEPS) for index, length in enumerate(lengths)]
    tokens, mask = left_padded(rows)
    together = drive(model, PolicyCache(model, policy, budget, row_seeds=(3, 4)), tokens, PROMPT, mask)
    for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        cache = PolicyCache(model, policy, budget, row_seeds=(3 + index,))
        alone = drive(model, cache, row[None], length)
        for one, other in zip(together.held, alone.held, strict=True):
            assert [layer[index] for layer in one] == [layer[0] for layer in other]
        logits = torch.stack([step[index] for step in together.logits])
        torch.testing.assert_close(logits, torch.stack(alone.logits)[:, 0], rtol=1e-5, atol=1e-5)


def test_draws_follow_the_sequence_not_its_place_in_the_batch() -> None:
    model, tokens = tiny_model("llama_gqa"), random_tokens(3, 1, PROMPT + STEPS)
    policy, budget = H2O(merge=CaM()), Budget(tokens=9)

    def last(rows: Tensor, seeds: tuple[int, ...]) -> Tensor:
        return drive(model, PolicyCache(model, policy, budget, row_seeds=seeds), rows, PROMPT).logits[-1]

    both = last(tokens.expand(2, -1), (5, 6))
    torch.testing.assert_close(both[0], last(tokens, (5,))[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(both[1], last(tokens, (6,))[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(both[0], both[1], atol=1e-3)
