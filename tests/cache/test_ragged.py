"""Heads of different lengths in one buffer: what it holds, what it weighs, and its steps beside plain lists."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvbench.cache import Budget, Needs, Plan, PolicyCache, ScorePolicy, View
from kvbench.cache.ragged import RaggedSlots, settle_ragged, spread_of
from kvbench.cache.slots import Entries, settle
from kvbench.cache.view import unread
from kvbench.contract.driving import Trace, drive, held_positions, storage_bytes, tensors_of
from kvbench.errors import PolicyError
from kvbench.kernels.dispatch import interpreted, kernels_forced, triton_installed
from kvbench.policies.allocation.ada import Ada
from kvbench.policies.h2o import H2O
from kvbench.policies.merge.nearest_cosine import NearestCosine
from kvbench.policies.snapkv import SnapKV
from tests.cache.test_slots import random_entries
from tests.covering import share_of
from tests.tiny_models import random_tokens, tiny_model

WIDTH = 3
PROMPT, STEPS = 40, 12


def plan_of(entries: Entries, merging: bool) -> Plan:
    held = entries.position >= 0
    keep = held & (torch.rand(held.shape) < torch.rand(2, 2, 1))
    keep[..., 0] = True
    own = torch.arange(held.shape[-1]).expand(held.shape)
    into = torch.where(held & ~keep & (torch.rand(held.shape) < 0.5), 0, own)
    return Plan(keep=keep, merge_into=into if merging else None)


def ragged(entries: Entries, plan: Plan | None, extra: int) -> RaggedSlots:
    spread, means = spread_of(entries, plan)
    return settle_ragged(entries, plan, spread, [mean + extra for mean in means])


def same_entries(ours: RaggedSlots, padded: Entries, length: Tensor) -> None:
    for row in range(2):
        for head in range(2):
            held = int(length[row, head])
            for mine, theirs in zip(ours.entries.tensors(), padded.tensors(), strict=True):
                assert torch.equal(mine[row, head, :held], theirs[row, head, :held])
            assert bool((ours.position[row, head, held:] < 0).all())


@settings(max_examples=share_of(100), deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32), length=st.integers(1, 12), merging=st.booleans(), extra=st.integers(0, 4))
def test_a_ragged_buffer_holds_what_padded_slots_hold(seed: int, length: int, merging: bool, extra: int) -> None:
    entries = random_entries(seed, length)
    plan = plan_of(entries, merging)
    padded, ours = settle(entries, plan, length + 5), ragged(entries, plan, extra)
    assert torch.equal(ours.length, padded.length)
    same_entries(ours, padded.entries, padded.length)
    counts = plan.keep.sum(dim=-1)
    means = [-(-sum(row) // 2) for row in counts.tolist()]
    slots = sum(int(counts[row].sum()) + 2 * extra for row in range(2))
    assert ours.flat.keys.shape == (slots, WIDTH)
    assert ours.stored_bytes() == 2 * slots * WIDTH * 4
    assert ours.has_room([mean + extra for mean in means])
    assert not ours.has_room([means[0], means[1] + extra + 1])


def means(lists: list[list[list[int]]], spread: list[list[int]]) -> list[int]:
    """What a head of each row would hold were all alike."""
    rows = zip(lists, spread, strict=True)
    return [max(len(head) - more for head, more in zip(row, given, strict=True)) for row, given in rows]


@settings(max_examples=share_of(60), deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32), by_kernels=st.booleans(), budget=st.integers(1, 6), more=st.integers(0, 3))
def test_steps_in_a_ragged_buffer_are_the_steps_of_each_head_alone(
    seed: int, by_kernels: bool, budget: int, more: int
) -> None:
    """Write, free the oldest where a head exceeds its share, and grow where there is no room: beside lists."""
    by_kernels = by_kernels and triton_installed() and interpreted()  # on a GPU whole decodes are compared
    if by_kernels:
        from kvbench.kernels.slot_writes import free_given, write_slot
    entries = random_entries(seed, 8)
    slots = ragged(entries, plan_of(entries, False), more)
    assert slots.flat.mass is not None
    spread, budgets = slots.spread.tolist(), torch.tensor([budget, budget + 2])
    lists = [[[p for p in head if p >= 0] for head in row] for row in slots.position.tolist()]
    held = means(lists, spread)
    for step in range(6):
        held = [count + 1 for count in held]
        if not slots.has_room(held):
            slots.grow(2)
        seen = torch.full((2,), 50 + step)
        keys, values = torch.randn(2, 2, 1, WIDTH), torch.randn(2, 2, 1, WIDTH)
        if by_kernels:
            with kernels_forced(True):
                write_slot(slots.columns(), keys, values, seen, advance=False)
        else:
            slots.write(keys, values, seen - 1)
        oldest = slots.position.masked_fill(slots.position < 0, 10**6).argmin(dim=-1)
        over = slots.over(budgets)
        if by_kernels:
            with kernels_forced(True):
                free_given(slots.columns(), oldest, budgets)
        else:
            slots.release(oldest, over)
        for row in range(2):
            for head in range(2):
                mine = lists[row][head]
                mine.append(49 + step)
                assert bool(over[row, head]) == (len(mine) > int(budgets[row]) + spread[row][head])
                if bool(over[row, head]):
                    mine.remove(min(mine))
        held = means(lists, spread)
        assert [[sorted(p for p in head if p >= 0) for head in row] for row in slots.position.tolist()] == [
            [sorted(head) for head in row] for row in lists
        ]
    assert not bool(slots.faults.any())


def test_a_head_that_is_freed_shrinks_the_storage() -> None:
    entries = random_entries(1, 30)
    entries.position.copy_(torch.arange(30).expand(2, 2, 30))
    keep = torch.ones(2, 2, 30, dtype=torch.bool)
    whole = ragged(entries, Plan(keep=keep), extra=1)
    keep = keep.clone()
    keep[0, 1, 1:] = False  # one head keeps a single entry
    freed = ragged(entries, Plan(keep=keep), extra=1)
    entry_bytes = 2 * WIDTH * 4
    assert whole.stored_bytes() == 4 * 31 * entry_bytes
    assert whole.stored_bytes() - freed.stored_bytes() in (29 * entry_bytes, 28 * entry_bytes)  # a mean rounded up
    assert storage_bytes([freed.flat.keys, freed.flat.values]) == freed.stored_bytes()
    assert freed.start.tolist() == [[0, 31], [33, 64]] or freed.start.tolist() == [[0, 32], [34, 65]]


@dataclass(frozen=True, kw_only=True)
class FirstHead(ScorePolicy):
    """The first head of a layer scores higher than all others."""

    def score(self, view: View) -> Tensor:
        heads = torch.arange(view.position.shape[1], device=view.position.device)[None, :, None]
        return view.position.float() - 1000.0 * heads


def naive_ada(score: Tensor, protected: Tensor, budget: int, alpha: float) -> list[int]:
    """Entries of each head (H, T), by sorting all candidates of the layer; rests to the largest fractions."""
    heads, entries = score.shape
    candidates = [(float(score[h, t]), t, -h) for h in range(heads) for t in range(entries) if not protected[h, t]]
    kept = [int(protected[h].sum()) for h in range(heads)]
    free = heads * budget - sum(kept)
    best = sorted(candidates, reverse=True)[:free]
    exact = [(1 - alpha) * sum(-one[2] == h for one in best) + alpha * free / heads for h in range(heads)]
    whole = [int(share + 1e-9) for share in exact]
    order = sorted(range(heads), key=lambda h: (-round(exact[h] - whole[h], 9), h))
    for h in order[: free - sum(whole)]:
        whole[h] += 1
    return [a + b for a, b in zip(kept, whole, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Given(ScorePolicy):
    """Scores that a test draws; frozen policies are hashed, so they come by name."""

    seed: int = 0

    def score(self, view: View) -> Tensor:
        random = torch.Generator().manual_seed(self.seed + view.layer)
        drawn = torch.randint(0, 9, view.position.shape, generator=random).float()
        return drawn * torch.arange(1, view.position.shape[1] + 1)[None, :, None]


@settings(max_examples=share_of(40), deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), budget=st.integers(4, 20), alpha=st.sampled_from([0.0, 0.2, 0.5, 1.0]))
def test_heads_hold_what_a_sorted_list_of_their_layer_gives_them(seed: int, budget: int, alpha: float) -> None:
    model = tiny_model("llama_mha")
    policy = Given(seed=seed, num_sinks=1, num_recent=2, allocation=Ada(alpha=alpha))
    held = drive(model, PolicyCache(model, policy, Budget(tokens=budget)), random_tokens(1, 1, 24), 24).held[0]
    protected = torch.zeros(4, 24, dtype=torch.bool)
    protected[:, [0, 22, 23]] = True
    for number, layer in enumerate(held):
        random = torch.Generator().manual_seed(seed + number)
        score = torch.randint(0, 9, (1, 4, 24), generator=random).float()[0] * torch.arange(1, 5)[:, None]
        assert [len(head) for head in layer[0]] == naive_ada(score, protected, budget, alpha)
        for head, positions in enumerate(layer[0]):
            others = sorted(set(range(1, 22)), key=lambda t: (float(score[head, t]), t))
            assert set(positions) == {0, 22, 23, *others[len(others) - len(positions) + 3 :]}


def test_adakvs_bytes_are_uniforms_and_follow_the_sum_of_its_lengths() -> None:
    model, tokens, stored, lengths = tiny_model("llama_mha"), random_tokens(2, 1, PROMPT), {}, {}
    for name, allocation in (("uniform", None), ("ada", Ada(alpha=0.0))):
        cache = PolicyCache(model, SnapKV(num_recent=4, allocation=allocation), Budget(tokens=12), reserve_tokens=STEPS)
        trace = drive(model, cache, tokens, PROMPT)
        stored[name] = cache.occupancy().stored_bytes
        lengths[name] = [len(head) for layer in trace.held[0] for head in layer[0]]
        held = tensors_of(cache)
        assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in held)
    assert sum(lengths["ada"]) == sum(lengths["uniform"]) == 8 * 12
    assert len(set(lengths["ada"])) > 2
    assert stored["ada"] == stored["uniform"] == 8 * (12 + STEPS + 1) * 2 * 8 * 4
    cache = PolicyCache(model, FirstHead(num_recent=1, allocation=Ada(alpha=0.0)), Budget(tokens=12))
    trace = drive(model, cache, tokens, PROMPT)
    assert [[len(head) for head in layer[0]] for layer in trace.held[0]] == [[40, 6, 1, 1]] * 2
    assert cache.occupancy().stored_bytes < 8 * 14 * 2 * 8 * 4, "padded to the longest head it would be 8 * 41"
    assert cache.occupancy().entries_peak == 40
    assert cache.occupancy().entries_mean == 12


DIVIDED = {
    "each_step": H2O(allocation=Ada(alpha=0.0)),
    "prompt_only": SnapKV(num_recent=4, allocation=Ada()),
    "in_blocks": H2O(allocation=Ada(alpha=0.0), every_tokens=3, merge=NearestCosine()),
}


def decoded(name: str, positions: Any, *, by_kernels: bool, reserve_tokens: int) -> Trace:
    """A batch with a padded prompt, and a few steps."""
    model, tokens = tiny_model("llama_gqa"), random_tokens(3, 2, 30)
    mask = torch.ones_like(tokens)
    mask[1, :7] = 0
    cache = PolicyCache(model, DIVIDED[name], Budget(fraction=0.4), positions=positions, reserve_tokens=reserve_tokens)
    with kernels_forced(by_kernels):
        return drive(model, cache, tokens, 25, mask)


@pytest.mark.parametrize("positions", ["original", "in_cache", "released"])
@pytest.mark.parametrize("name", DIVIDED)
def test_a_buffer_that_grows_holds_what_one_with_room_holds(name: str, positions: Any) -> None:
    announced, grown = (decoded(name, positions, by_kernels=False, reserve_tokens=room) for room in (5, 0))
    assert announced.held == grown.held
    assert len({len(head) for layer in grown.held[0] for row in layer for head in row}) > 2
    torch.testing.assert_close(torch.stack(grown.logits), torch.stack(announced.logits), rtol=1e-5, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("positions", ["original", "in_cache", "released"])
@pytest.mark.parametrize("name", DIVIDED)
def test_kernels_read_and_write_a_ragged_buffer_as_plain_torch_does(name: str, positions: Any) -> None:
    if not (triton_installed() and interpreted()):
        pytest.skip("on a GPU tests/tasks/test_graph.py compares whole decodes")
    plain, kernels = (decoded(name, positions, by_kernels=by, reserve_tokens=5) for by in (False, True))
    assert plain.held == kernels.held
    torch.testing.assert_close(torch.stack(kernels.logits), torch.stack(plain.logits), rtol=2e-4, atol=2e-4)


@dataclass(frozen=True, kw_only=True)
class WrongAda(Ada):
    def heads(self, view: View, candidates: Tensor, free: Tensor) -> Tensor:
        return super().heads(view, candidates, free) + 1


def test_heads_are_never_given_more_than_their_layer_has() -> None:
    model = tiny_model("llama_gqa")
    with pytest.raises(PolicyError, match=r"WrongAda.heads returned .* in layer 0; it must be \(B, H\)"):
        drive(model, PolicyCache(model, H2O(allocation=WrongAda()), Budget(tokens=9)), random_tokens(1, 1, 30), 30)


@dataclass(frozen=True, kw_only=True)
class OwnPlan(ScorePolicy):
    """A policy with a plan of its own, in which heads keep different numbers."""

    needs = Needs.MASS

    def plan(self, view: View) -> Plan:
        keep = view.valid.clone()
        keep[:, 0, : view.position.shape[-1] - int(view.budget[0])] = False
        return Plan(keep=keep)


def test_a_plan_of_a_policys_own_is_held_to_its_budget_in_every_head() -> None:
    model = tiny_model("llama_gqa")
    with pytest.raises(PolicyError, match="allowed per row: 1 to"):
        drive(model, PolicyCache(model, OwnPlan(), Budget(tokens=9)), random_tokens(1, 1, 30), 30)


def test_a_snapshot_brings_a_ragged_cache_back() -> None:
    model, policy = tiny_model("llama_gqa"), H2O(allocation=Ada(alpha=0.0))
    cache: PolicyCache = PolicyCache(model, policy, Budget(tokens=9), reserve_tokens=STEPS)
    tokens = random_tokens(3, 1, PROMPT + 1)
    before = drive(model, cache, tokens[:, :PROMPT], PROMPT).held[-1]
    state = cache.snapshot()
    step = drive(model, cache, tokens[:, PROMPT:], 1)
    cache.restore(state)
    assert held_positions(cache) == before != step.held[-1]
    again = drive(model, cache, tokens[:, PROMPT:], 1)
    assert again.held == step.held
    assert torch.equal(again.prompt_logits, step.prompt_logits)


def test_keys_and_values_are_copied_only_for_a_policy_that_reads_them() -> None:
    shown: list[View] = []

    @dataclass(frozen=True, kw_only=True)
    class Latest(ScorePolicy):
        reads: bool = False

        def score(self, view: View) -> Tensor:
            if view.new_tokens == 1:
                shown.append(view)
            return view.position.float() + (view.keys.sum(dim=-1) if self.reads else 0.0)

    for reads in (False, True):
        shown.clear()
        model = tiny_model("llama_gqa")
        cache = PolicyCache(model, Latest(reads=reads, allocation=Ada()), Budget(tokens=8))
        drive(model, cache, random_tokens(2, 1, PROMPT + STEPS), PROMPT)
        assert any(isinstance(layer.slots, RaggedSlots) for layer in cache.policy_layers)
        copied = [isinstance(unread(view, "keys"), Tensor) for view in shown[len(cache.policy_layers) :]]
        assert copied
        assert set(copied) == {reads}, "what a policy writes is watched the first time, which reads all"
        assert all(not isinstance(unread(view, "values"), Tensor) for view in shown[len(cache.policy_layers) :])
    view = shown[-1]
    assert view.keys is view.keys
    assert view.keys.shape == (*view.position.shape, view.keys.shape[-1])
