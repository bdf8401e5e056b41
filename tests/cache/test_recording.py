from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from kvbench.cache import Budget, Kind, Needs, Policy, PolicyCache, ScorePolicy, View, cache_argument, layer
from kvbench.cache.positions import PositionMode
from kvbench.cache.recording import PromptRecorder, Recording, cache_after
from kvbench.contract.driving import left_padded, repeat_where_asked
from kvbench.contract.terms import BUDGETS, budget_named
from kvbench.policies.full import Full
from kvbench.policies.h2o import H2O
from tests.tiny_models import random_tokens, tiny_model

PROMPT, STEPS = 19, 9


@dataclass(frozen=True, kw_only=True)
class Everything(ScorePolicy):
    """Reads every statistic there is, with a reduction of its own."""

    needs = Needs.MASS | Needs.WINDOW | Needs.PROBS
    reduction = "max"
    window_tokens = 5

    def score(self, view: View) -> Tensor:
        if not view.prefill:
            return view.mass + view.probs
        return view.mass + view.window.sum(dim=2) + view.probs + view.kind


@dataclass(frozen=True, kw_only=True)
class Vandal(H2O):
    """Writes over everything it is shown."""

    def plan(self, view: View) -> Any:
        plan = super().plan(view)
        for tensor in (view.keys, view.values, view.mass):
            tensor.fill_(7.0)
        return plan


def inputs(batch: int) -> tuple[Tensor, Tensor]:
    rows = [random_tokens(row, PROMPT - 6 * row) for row in range(batch)]
    return left_padded(rows)


def kinds(tokens: Tensor) -> Tensor:
    return torch.where(tokens % 3 == 0, int(Kind.IMAGE), int(Kind.TEXT)).to(torch.int8)


def forward(model: Any, cache: Any, tokens: Tensor, mask: Tensor) -> Tensor:
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    logits: Tensor = model(tokens, attention_mask=mask, position_ids=position, **cache_argument(model, cache)).logits[
        :, -1
    ]
    repeat_where_asked(model, cache, tokens, mask)
    return logits


def decoded(model: Any, cache: PolicyCache, mask: Tensor) -> list[Tensor]:
    forced = random_tokens(99, mask.shape[0], STEPS)
    start = mask.sum(dim=-1, keepdim=True)
    return [
        model(forced[:, n : n + 1], position_ids=start + n, **cache_argument(model, cache)).logits[:, -1]
        for n in range(STEPS)
    ]


def record(model: Any, tokens: Tensor, mask: Tensor, policies: list[Policy]) -> tuple[Recording, Tensor]:
    recorder = PromptRecorder(model, policies)
    logits = forward(model, recorder, tokens, mask)
    return recorder.prompt, logits


def options(tokens: Tensor) -> dict[str, Any]:
    return {"reserve_tokens": STEPS, "prompt_kind": kinds(tokens), "row_seeds": list(range(tokens.shape[0]))}


@pytest.mark.cover("mechanisms", whole="pairs")
@pytest.mark.parametrize("budget_name", BUDGETS)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", ["llama_gqa", "llama_mha"])
@torch.inference_mode()
def test_a_cache_made_from_a_recording_is_bit_for_bit_one_with_a_prefill_of_its_own(
    policy: Policy, positions: PositionMode, batch: int, name: str, budget_name: str
) -> None:
    model, limit = tiny_model(name), budget_named(budget_name, policy)
    tokens, mask = inputs(batch)
    prompt, logits = record(model, tokens, mask, [Everything(), policy, Full()])
    own = PolicyCache(model, policy, limit, positions=positions, **options(tokens))
    assert torch.equal(forward(model, own, tokens, mask), logits)
    shared = cache_after(prompt, PolicyCache(model, policy, limit, positions=positions, **options(tokens)))
    repeat_where_asked(model, shared, tokens, mask)
    assert_same(own, shared)
    for expected, got in zip(decoded(model, own, mask), decoded(model, shared, mask), strict=True):
        assert torch.equal(expected, got)
    assert_same(own, shared)


def assert_same(own: PolicyCache, shared: PolicyCache) -> None:
    for ours, theirs in zip(own.policy_layers, shared.policy_layers, strict=True):
        assert ours.ledger == theirs.ledger
        assert ours.is_initialized == theirs.is_initialized
        assert ours.slots is not None
        assert theirs.slots is not None
        pairs = zip(ours.slots.entries.columns(), theirs.slots.entries.columns(), strict=True)
        tensors = [*pairs, (ours.keys, theirs.keys), (ours.values, theirs.values)]
        for mine, other in [*tensors, (ours.slots.length, theirs.slots.length), (ours.slots.free, theirs.slots.free)]:
            assert mine is not None
            assert other is not None
            assert torch.equal(mine, other)


@torch.inference_mode()
def test_statistics_of_every_kind_are_shared(positions: PositionMode) -> None:
    model = tiny_model("llama_gqa")
    tokens, mask = inputs(2)
    prompt, _ = record(model, tokens, mask, [Everything(), H2O()])
    own = PolicyCache(model, Everything(), Budget(tokens=6), positions=positions, **options(tokens))
    forward(model, own, tokens, mask)
    empty = PolicyCache(model, Everything(), Budget(tokens=6), positions=positions, **options(tokens))
    assert_same(own, cache_after(prompt, empty))


@torch.inference_mode()
def test_a_policy_that_writes_into_its_view_harms_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer, "ReadOnly", lambda *_: nullcontext())  # only its first question is watched
    model = tiny_model("llama_gqa")
    tokens, mask = inputs(1)
    prompt, _ = record(model, tokens, mask, [H2O()])

    def made(policy: Policy) -> PolicyCache:
        return cache_after(prompt, PolicyCache(model, policy, Budget(tokens=5), **options(tokens)))

    before = made(H2O())
    made(Vandal())
    assert_same(before, made(H2O()))


@torch.inference_mode()
def test_what_was_not_recorded_is_refused() -> None:
    model = tiny_model("llama_gqa")
    tokens, mask = inputs(1)
    with pytest.raises(ValueError, match="run the prompt first"):
        _ = PromptRecorder(model, []).prompt
    prompt, _ = record(model, tokens, mask, [Full()])
    with pytest.raises(KeyError):
        cache_after(prompt, PolicyCache(model, H2O(), Budget(tokens=5), reserve_tokens=1))
