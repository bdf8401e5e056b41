"""Dividing entries among layers and heads: the arithmetic against plain loops, and who pays for whom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvbench.cache import Allocation, Budget, PolicyCache, Room, View, cache_argument
from kvbench.cache.parts import layer_entries, split
from kvbench.contract.driving import Trace, drive
from kvbench.errors import ConfigError, NonFiniteChoiceError, PolicyError
from kvbench.policies.allocation.pyramid import Pyramid
from kvbench.policies.h2o import H2O
from kvbench.policies.snapkv import SnapKV
from tests.contract import MiddleFirst
from tests.covering import share_of
from tests.tiny_models import random_tokens, tiny_model

quick = settings(max_examples=share_of(200), deadline=None, derandomize=True)
WEIGHTS = st.lists(st.integers(0, 9), min_size=1, max_size=6)


def naive_split(weights: list[int], total: int, most: list[int]) -> list[int]:
    """One full one after the other is set aside; whole parts first, then the largest rests."""
    total, full = min(total, sum(most)), set[int]()
    while True:
        left = total - sum(most[i] for i in full)
        others = [i for i in range(len(weights)) if i not in full]
        weigh = {i: weights[i] if any(weights[j] for j in others) else 1 for i in others}
        share = {i: Fraction(left * weigh[i], sum(weigh.values())) for i in others}
        newly = {i for i in others if share[i] >= most[i]}
        if not newly:
            break
        full |= newly
    shares = [most[i] if i in full else int(share[i]) for i in range(len(weights))]
    by_rest = sorted(share, key=lambda i: (-(share[i] - int(share[i])), i))
    for i in by_rest[: total - sum(shares)]:
        shares[i] += 1
    return shares


@quick
@given(weights=WEIGHTS, total=st.integers(0, 60), data=st.data())
def test_a_total_is_split_exactly_and_as_plain_loops_do(weights: list[int], total: int, data: st.DataObject) -> None:
    most = data.draw(st.lists(st.integers(0, 20), min_size=len(weights), max_size=len(weights)))
    shares = split(torch.tensor(weights), torch.tensor(total), torch.tensor(most)).tolist()
    assert sum(shares) == min(total, sum(most))
    assert all(0 <= share <= limit for share, limit in zip(shares, most, strict=True))
    assert shares == naive_split(weights, total, most)


@quick
@given(rows=st.lists(st.tuples(WEIGHTS, st.integers(0, 40)), min_size=2, max_size=3), most=st.integers(1, 12))
def test_rows_are_split_alike_alone_and_together(rows: list[tuple[list[int], int]], most: int) -> None:
    width = max(len(weights) for weights, _ in rows)
    padded = torch.tensor([weights + [0] * (width - len(weights)) for weights, _ in rows])
    limits = torch.tensor([[most] * len(weights) + [0] * (width - len(weights)) for weights, _ in rows])
    together = split(padded, torch.tensor([total for _, total in rows]), limits)
    for (weights, total), row in zip(rows, together.tolist(), strict=True):
        alone = split(torch.tensor(weights), torch.tensor(total), torch.full((len(weights),), most)).tolist()
        assert row[: len(weights)] == alone


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -1.0])
def test_a_weight_that_is_no_number_is_refused(weight: float) -> None:
    with pytest.raises(NonFiniteChoiceError, match="NaN, infinity or less than 0"):
        split(torch.tensor([1.0, weight]), torch.tensor(3), torch.tensor([3, 3]))


ROOMS = st.builds(
    lambda layers, protected, free, more: Room(
        num_layers=layers, num_heads=2, budget=protected + free, tokens=protected + free + more, protected=protected
    ),
    st.integers(1, 9),
    st.integers(1, 8),
    st.integers(0, 30),
    st.integers(1, 60),
)


@quick
@given(room=ROOMS, beta=st.integers(1, 30))
def test_a_pyramid_is_the_papers_line_with_the_uniform_total(room: Room, beta: int) -> None:
    shares = layer_entries(Pyramid(beta=beta), (), room)
    assert sum(shares) == room.num_layers * room.budget
    assert all(room.protected <= share <= room.tokens for share in shares)
    assert list(shares) == sorted(shares, reverse=True)
    free, longest = room.budget - room.protected, room.tokens - room.protected
    least = free // beta
    most = 2 * free - least
    if most >= longest:
        most, least = longest, 2 * free - longest
    for layer, share in enumerate(shares):
        line = most - Fraction(layer * (most - least), max(1, room.num_layers - 1))
        assert abs(share - room.protected - line) < 1 or room.num_layers == 1


@quick
@given(room=ROOMS, skip=st.sets(st.integers(-9, 8), max_size=3), pyramid=st.booleans())
def test_layers_that_are_skipped_stay_whole_and_the_others_pay(room: Room, skip: set[int], pyramid: bool) -> None:
    skipped = {layer % room.num_layers for layer in skip}
    allocation = Pyramid() if pyramid else None
    left = room.num_layers * room.budget - len(skipped) * room.tokens
    there = all(-room.num_layers <= layer < room.num_layers for layer in skip) and len(skipped) < room.num_layers
    if not there or (skipped and left // (room.num_layers - len(skipped)) < room.protected):
        with pytest.raises(ConfigError, match=r"policy\.skip_layers"):
            layer_entries(allocation, tuple(skip), room)
        return
    entries = layer_entries(allocation, tuple(skip), room)
    assert sum(entries) == room.num_layers * room.budget
    assert all(entries[layer] == room.tokens for layer in skipped)
    assert all(room.protected <= share <= room.tokens for share in entries)


@dataclass(frozen=True, kw_only=True)
class Wrong(Allocation):
    """Breaks its word in a way of its choice."""

    shares: tuple[int, ...]

    def layers(self, room: Room, told: Sequence[Tensor]) -> Sequence[int]:
        return self.shares


@dataclass(frozen=True, kw_only=True)
class WrongButBounded(Wrong):
    total: ClassVar[Literal["exact", "bounded", "data_dependent"]] = "bounded"


@dataclass(frozen=True, kw_only=True)
class WrongButFree(Wrong):
    total: ClassVar[Literal["exact", "bounded", "data_dependent"]] = "data_dependent"


def test_an_allocation_is_held_to_the_total_that_it_declares() -> None:
    room = Room(num_layers=3, num_heads=2, budget=10, tokens=20, protected=2)
    assert layer_entries(Wrong(shares=(20, 8, 2)), (), room) == (20, 8, 2)
    assert layer_entries(WrongButBounded(shares=(9, 8, 2)), (), room) == (9, 8, 2)
    assert layer_entries(WrongButFree(shares=(20, 20, 2)), (), room) == (20, 20, 2)
    for wrong in (
        Wrong(shares=(9, 8, 2)),
        Wrong(shares=(20, 9, 2)),
        Wrong(shares=(20, 9, 1)),
        Wrong(shares=(21, 7, 2)),
        Wrong(shares=(20, 10)),
        WrongButBounded(shares=(20, 9, 2)),
        WrongButFree(shares=(21, 20, 2)),
    ):
        with pytest.raises(PolicyError, match=r"Wrong\w*.layers"):
            layer_entries(wrong, (), room)


@dataclass(frozen=True, kw_only=True)
class ByMass(Allocation):
    """No published method: layers by the largest score that they have, all seen first."""

    waits: ClassVar[bool] = True

    def tell(self, view: View, ranking: Tensor) -> Tensor:
        return ranking.masked_fill(ranking.isinf() | ~view.valid, 0.0).amax(dim=(1, 2))[:, None]

    def layers(self, room: Room, told: Sequence[Tensor]) -> Sequence[int]:
        free = torch.tensor(room.num_layers * (room.budget - room.protected))
        most = torch.full((room.num_layers,), room.tokens - room.protected)
        return [room.protected + share for share in split(torch.cat(list(told)), free, most).tolist()]


PROMPT, STEPS = 40, 12
LAYERED = {"static": Pyramid(beta=3), "waiting": ByMass()}


def lengths(trace: Trace, step: int) -> list[list[int]]:
    """Entries of each layer in each row, the same in all of its heads."""
    found = []
    for layer in trace.held[step]:
        sizes = [{len(head) for head in row} for row in layer]
        assert all(len(size) == 1 for size in sizes)
        found.append([size.pop() for size in sizes])
    return found


@pytest.mark.parametrize("of", ["seen", "prompt"])
@pytest.mark.parametrize("name", LAYERED)
def test_layers_differ_and_their_sum_is_the_uniform_one_at_every_step(name: str, of: Literal["seen", "prompt"]) -> None:
    model, budget = tiny_model("llama_gqa"), Budget(fraction=0.4, of=of)
    cache = PolicyCache(model, H2O(allocation=LAYERED[name]), budget, reserve_tokens=STEPS)
    trace = drive(model, cache, random_tokens(3, 1, PROMPT + STEPS), PROMPT)
    for step in range(STEPS + 1):
        counts = [row[0] for row in lengths(trace, step)]
        assert counts[0] != counts[1]
        assert sum(counts) == 2 * budget.entries(seen_tokens=PROMPT + step, prompt_tokens=PROMPT)


@pytest.mark.parametrize("name", LAYERED)
def test_a_prompt_is_divided_alike_alone_and_in_a_padded_batch(name: str) -> None:
    model, policy, budget = tiny_model("llama_gqa"), H2O(allocation=LAYERED[name]), Budget(tokens=14)
    rows = [random_tokens(4, PROMPT), random_tokens(5, PROMPT - 9), random_tokens(6, 11)]
    tokens, mask = torch.zeros(3, PROMPT + STEPS, dtype=torch.int64), torch.ones(3, PROMPT + STEPS, dtype=torch.int64)
    more = random_tokens(7, STEPS)
    for index, row in enumerate(rows):
        mask[index, : PROMPT - len(row)] = 0
        tokens[index] = torch.cat((torch.zeros(PROMPT - len(row), dtype=torch.int64), row, more))
    together = drive(model, PolicyCache(model, policy, budget), tokens, PROMPT, mask)
    for index, row in enumerate(rows):
        alone = drive(model, PolicyCache(model, policy, budget), torch.cat((row, more))[None], len(row))
        for step in range(STEPS + 1):
            assert [layer[index] for layer in together.held[step]] == [layer[0] for layer in alone.held[step]]
            counts = [layer[index] for layer in lengths(together, step)]
            assert sum(counts) == 2 * min(14, len(row) + step)


def test_a_second_prompt_is_divided_anew_and_never_above_the_total() -> None:
    model, budget = tiny_model("llama_gqa"), Budget(fraction=0.4)
    for allocation in LAYERED.values():
        cache = PolicyCache(model, H2O(allocation=allocation), budget)
        first = drive(model, cache, random_tokens(3, 1, PROMPT + 3), PROMPT)
        second = drive(model, cache, random_tokens(8, 1, 17), 17)
        for trace, seen in ((first, PROMPT), (second, PROMPT + 3 + 17)):
            allowed = 2 * budget.entries(seen_tokens=seen, prompt_tokens=PROMPT)
            assert allowed - 4 <= sum(row[0] for row in lengths(trace, 0)) <= allowed


@dataclass(frozen=True, kw_only=True)
class Turning(Allocation):
    """No published method: the first layer holds almost all of a prompt of even length, the last of an odd one."""

    def layers(self, room: Room, told: Sequence[Tensor]) -> Sequence[int]:
        free = min(room.budget - room.protected, room.tokens - room.budget)
        if room.num_layers == 1:
            return [room.budget]
        shares = [room.budget + free, *[room.budget] * (room.num_layers - 2), room.budget - free]
        return shares if room.tokens % 2 == 0 else shares[::-1]


@settings(max_examples=share_of(40), deadline=None, derandomize=True)
@given(
    allocation=st.sampled_from([None, Turning(), *LAYERED.values()]),
    skip=st.sampled_from([(), (-1,)]),
    budget=st.one_of(
        st.builds(Budget, tokens=st.integers(26, 50)),
        st.builds(Budget, fraction=st.sampled_from([0.6, 0.8]), of=st.sampled_from(["seen", "prompt"])),
    ),
    cuts_at_decode=st.booleans(),
    turns=st.lists(st.integers(2, 30), min_size=1, max_size=2),
    steps=st.integers(0, 9),
)
def test_a_later_prompt_is_divided_to_the_uniform_total_although_no_layer_can_hold_what_it_lost(
    allocation: Allocation | None,
    skip: tuple[int, ...],
    budget: Budget,
    cuts_at_decode: bool,
    turns: list[int],
    steps: int,
) -> None:
    model, kind = tiny_model("llama_gqa"), MiddleFirst if cuts_at_decode else SnapKV
    policy = kind(num_recent=3, allocation=allocation, skip_layers=skip)
    cache, seen, held, last = PolicyCache(model, policy, budget), 0, 0, 0
    for number, length in enumerate([PROMPT, *turns]):
        allowed, uncut = budget.entries(seen_tokens=seen + length, prompt_tokens=PROMPT), last + length
        if skip and 2 * allowed - uncut < policy.smallest_budget_tokens:
            with pytest.raises(ConfigError, match="leaves the others"):
                drive(model, cache, random_tokens(number, 1, length), length)
            return
        trace = drive(model, cache, random_tokens(number, 1, length + steps), length)
        assert sum(row[0] for row in lengths(trace, 0)) == min(2 * allowed, held + 2 * length)
        counts = [row[0] for row in lengths(trace, steps)]
        seen, held, last = seen + length + steps, sum(counts), counts[-1]


def test_layers_left_uncut_are_paid_for_by_the_others() -> None:
    model = tiny_model("llama_gqa")
    cache = PolicyCache(model, MiddleFirst(skip_layers=(-1,)), Budget(tokens=24))
    trace = drive(model, cache, random_tokens(3, 1, PROMPT + STEPS), PROMPT)
    assert lengths(trace, 0) == [[8], [40]]
    assert sum(row[0] for row in lengths(trace, STEPS)) == 48
    with pytest.raises(ConfigError, match=r"leaves 1 of 2 layers uncut, 40 entries each.* leaves the others 0"):
        drive(model, PolicyCache(model, MiddleFirst(skip_layers=(0,)), Budget(tokens=20)), random_tokens(3, 1, 40), 40)


def test_until_the_last_layer_came_every_prompt_lies_whole_and_that_is_measured() -> None:
    from kvbench.tasks.memory import PhasePeaks

    model, tokens, peaks = tiny_model("llama_gqa"), random_tokens(3, 1, 400), {}
    for name, allocation in LAYERED.items():
        counted = PhasePeaks(devices=[torch.device("cpu")], base_bytes=0)
        cache = PolicyCache(
            model, H2O(allocation=allocation), Budget(tokens=20), on_settle=lambda device, c=counted: c.phase("settle")
        )
        with counted.phase("prefill"), torch.no_grad():
            model(tokens, **cache_argument(model, cache), logits_to_keep=1)
        peaks[name] = max(counted.peak_bytes.values())
    one_layer = 2 * 2 * 8 * 4 * 400  # keys and values, KV heads, head size, float32, tokens
    assert peaks["waiting"] >= peaks["static"] + 0.9 * one_layer
