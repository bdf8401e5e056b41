"""Whole decodes through the kernels beside plain torch: the same victims at every step, the same logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvbench.cache import Budget, Policy, PolicyCache, cache_argument
from kvbench.cache.recording import EvictionLog
from kvbench.cache.slots import Slots
from kvbench.contract.driving import Trace, drive, left_padded
from kvbench.kernels.dispatch import interpreted, kernels_forced
from kvbench.policies.elastic import Elastic
from kvbench.policies.full import Full
from kvbench.policies.h2o import H2O
from kvbench.policies.merge.cam import CaM
from kvbench.policies.merge.d2o import D2O
from kvbench.policies.streaming_llm import StreamingLLM
from tests.tiny_models import random_tokens, tiny_model

pytest.importorskip("triton", reason="triton is not installed")

pytestmark = pytest.mark.skipif(not interpreted(), reason="on a GPU tests/tasks/test_graph.py compares whole decodes")

STEPS = 3


def decode(policy: Policy, positions: Any, by_kernels: bool, reserve_tokens: int) -> Trace:
    model = tiny_model("llama_gqa")
    prompt, mask = left_padded([random_tokens(2, 11), random_tokens(3, 17)])
    tokens = torch.cat((prompt, random_tokens(5, 2, STEPS)), dim=1)
    mask = torch.cat((mask, torch.ones(2, STEPS, dtype=mask.dtype)), dim=1)
    cache = PolicyCache(
        model, policy, Budget(fraction=0.5), positions=positions, reserve_tokens=reserve_tokens, row_seeds=(3, 4)
    )
    with kernels_forced(by_kernels):
        return drive(model, cache, tokens, prompt.shape[1], mask)


@pytest.mark.parametrize(
    ("policy", "positions"),
    [
        (H2O(), "in_cache"),
        pytest.param(H2O(merge=D2O()), "original", marks=pytest.mark.long),
        pytest.param(StreamingLLM(merge=CaM(spread_tokens=2)), "in_cache", marks=pytest.mark.long),
        pytest.param(Elastic(), "released", marks=pytest.mark.long),
        pytest.param(StreamingLLM(), "original", marks=pytest.mark.long),
    ],
)
def test_kernels_decode_as_plain_torch_does(policy: Policy, positions: Any) -> None:
    same_decode(policy, positions, STEPS)


@pytest.mark.cover(whole="values")
@pytest.mark.long
@pytest.mark.parametrize("reserve_tokens", [STEPS, 0])
def test_kernels_hold_the_entries_and_give_the_logits_of_plain_torch(
    policy: Policy, positions: Any, reserve_tokens: int
) -> None:
    same_decode(policy, positions, reserve_tokens)


def same_decode(policy: Policy, positions: Any, reserve_tokens: int) -> None:
    ours, reference = (decode(policy, positions, by_kernels, reserve_tokens) for by_kernels in (True, False))
    assert ours.held == reference.held
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(reference.logits), atol=2e-4, rtol=2e-4)


@pytest.mark.long
def test_the_kernel_that_writes_takes_the_fresh_slot_of_a_policy_that_frees_none(
    positions: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = decode(Full(), positions, False, STEPS)
    monkeypatch.setattr(Slots, "advance", lambda slots: pytest.fail("launched beside the kernel"))
    assert decode(Full(), positions, True, STEPS).held == reference.held


@pytest.mark.long
@pytest.mark.cover("one")
@pytest.mark.parametrize("name", ["h2o", "elastic", "streaming_llm"])
def test_the_eviction_log_reads_the_same_story_from_the_kernels_slots(name: str) -> None:
    policy: Policy = {"h2o": H2O(), "elastic": Elastic(), "streaming_llm": StreamingLLM()}[name]
    model, tokens = tiny_model("llama_gqa"), random_tokens(5, 1, 13 + STEPS)
    stories = []
    for by_kernels in (True, False):
        log = EvictionLog(num_tokens=13 + STEPS)
        cache = PolicyCache(model, policy, Budget(fraction=0.5), reserve_tokens=STEPS, on_plan=log.note_plan)
        with kernels_forced(by_kernels), torch.no_grad():
            model(tokens[:, :13], **cache_argument(model, cache))
            log.after_prompt(cache)
            for at in range(13, 13 + STEPS):
                model(tokens[:, at : at + 1], **cache_argument(model, cache))
                log.after_step(cache, [True])
        stories.append(log.freed(0).tolist())
    assert stories[0] == stories[1]
    assert any(step > 0 for layer in stories[0] for head in layer for step in head)
