"""Policies that cut in one phase only, statistics they declare, kinds of tokens, and buffers that grow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from kvbench.cache import Budget, Kind, Needs, PolicyCache, ScorePolicy, View, When, cache_argument
from kvbench.contract.driving import Held, drive, held_positions
from kvbench.policies.full import Full
from kvbench.policies.h2o import H2O
from kvbench.policies.streaming_llm import StreamingLLM
from tests.tiny_models import IMAGE_TOKEN, IMAGE_TOKENS, random_tokens, tiny_model

PROMPT, STEPS = 20, 12


@dataclass(frozen=True, kw_only=True)
class OnlyPrefill(ScorePolicy):
    """Cuts the prompt by what its last queries attend to."""

    needs: ClassVar[Needs] = Needs.WINDOW | Needs.PROBS
    when: ClassVar[When] = When.PREFILL
    window_tokens: ClassVar[int] = 4

    def score(self, view: View) -> Tensor:
        assert view.prefill
        assert view.window.shape[2] == 4
        torch.testing.assert_close(view.window[:, :, -1], view.probs, rtol=1e-5, atol=0)
        return view.window.sum(dim=2)


@dataclass(frozen=True, kw_only=True)
class OnlyDecode(ScorePolicy):
    """Drops what the newest query looks at least."""

    needs: ClassVar[Needs] = Needs.PROBS
    when: ClassVar[When] = When.DECODE

    def score(self, view: View) -> Tensor:
        assert not view.prefill
        assert view.new_tokens == 1
        torch.testing.assert_close(view.probs.sum(-1), torch.ones(view.probs.shape[:2]), rtol=0, atol=1e-5)
        return view.probs


def sizes(trace_held: list[Held]) -> list[set[int]]:
    return [{len(head) for layer in held for row in layer for head in row} for held in trace_held]


def test_a_policy_that_cuts_the_prompt_lets_generated_tokens_stay(tiny_llama: Any) -> None:
    cache = PolicyCache(tiny_llama, OnlyPrefill(), Budget(fraction=0.25))
    trace = drive(tiny_llama, cache, random_tokens(0, 1, PROMPT + STEPS), PROMPT)
    assert sizes(trace.held) == [{5 + step} for step in range(STEPS + 1)]


@pytest.mark.parametrize("tokens", [8, 25])
def test_a_policy_that_cuts_at_decode_keeps_the_prompts_size(tiny_llama: Any, tokens: int) -> None:
    cache = PolicyCache(tiny_llama, OnlyDecode(), Budget(tokens=tokens))
    trace = drive(tiny_llama, cache, random_tokens(0, 1, PROMPT + STEPS), PROMPT)
    assert sizes(trace.held) == [{min(PROMPT + step, max(PROMPT, tokens))} for step in range(STEPS + 1)]


@dataclass(frozen=True, kw_only=True)
class TextFirst(ScorePolicy):
    """Pictures go before text."""

    def score(self, view: View) -> Tensor:
        return (view.kind == Kind.TEXT).float()


def test_the_kind_of_a_token_follows_it_into_its_slot(tiny_llama: Any) -> None:
    kind = torch.zeros(1, PROMPT, dtype=torch.int8)
    kind[:, 3:12] = Kind.IMAGE
    cache = PolicyCache(tiny_llama, TextFirst(), Budget(tokens=15), prompt_kind=kind)
    trace = drive(tiny_llama, cache, random_tokens(0, 1, PROMPT + STEPS), PROMPT)
    assert trace.held[0][0][0][0] == (0, 1, 2, *range(8, PROMPT))
    assert trace.held[4][1][0][1] == (0, 1, 2, *range(12, PROMPT + 4))
    assert trace.held[5][1][0][1] == (1, 2, *range(12, PROMPT + 5))


@pytest.mark.parametrize("reserve_tokens", [0, 3, STEPS])
def test_announced_tokens_cost_one_allocation_and_others_a_copy(tiny_llama: Any, reserve_tokens: int) -> None:
    cache = PolicyCache(tiny_llama, Full(), reserve_tokens=reserve_tokens)
    tokens = random_tokens(0, 1, PROMPT + STEPS)
    drive(tiny_llama, cache, tokens[:, :PROMPT], PROMPT)
    slots = cache.policy_layers[0].slots
    assert slots is not None
    assert slots.capacity == PROMPT + reserve_tokens + 1
    before = slots.entries.keys.data_ptr()
    for at in range(PROMPT, PROMPT + STEPS):
        tiny_llama(tokens[:, at : at + 1], **cache_argument(tiny_llama, cache))
    assert (slots.entries.keys.data_ptr() == before) == (reserve_tokens == STEPS)
    assert held_positions(cache)[1][0][1] == tuple(range(PROMPT + STEPS))


def test_occupancy_counts_entries_and_bytes(tiny_llama: Any) -> None:
    cache = PolicyCache(tiny_llama, StreamingLLM(), Budget(tokens=7))
    with pytest.raises(ValueError, match="empty"):
        cache.occupancy()
    drive(tiny_llama, cache, random_tokens(0, 2, PROMPT + STEPS), PROMPT)
    occupancy, entry = cache.occupancy(), 2 * 8 * 4
    assert (occupancy.seen_tokens, occupancy.entries_mean, occupancy.entries_peak) == (PROMPT + STEPS, 7.0, 7)
    assert occupancy.valid_bytes == 2 * 2 * 2 * 7 * entry
    assert occupancy.stored_bytes == 2 * 2 * 2 * 8 * entry
    assert occupancy.bookkeeping_bytes == 2 * 2 * 2 * (8 * (8 + 1) + 2 * 8 + 4)
    assert occupancy.statistics_bytes == 0


def test_attention_mass_is_counted_as_statistics(tiny_llama: Any) -> None:
    cache = PolicyCache(tiny_llama, H2O(), Budget(tokens=7))
    drive(tiny_llama, cache, random_tokens(0, 2, PROMPT + STEPS), PROMPT)
    assert cache.occupancy().statistics_bytes == 2 * 2 * 2 * 8 * 4


@torch.no_grad()
def test_a_llava_with_everything_kept_says_what_the_stock_one_says(tiny_llava: Any) -> None:
    stock = tiny_model("llava", attached=False)
    assert tiny_llava.config.vision_config._attn_implementation == stock.config.vision_config._attn_implementation
    torch.manual_seed(0)
    tokens = random_tokens(0, 1, PROMPT)
    tokens[:, 2 : 2 + IMAGE_TOKENS] = IMAGE_TOKEN
    prompt = {"input_ids": tokens, "pixel_values": torch.randn(1, 3, 16, 16), "attention_mask": torch.ones_like(tokens)}
    torch.testing.assert_close(
        tiny_llava(**prompt, **cache_argument(tiny_llava, PolicyCache(tiny_llava, H2O()))).logits,
        stock(**prompt).logits,
        rtol=1e-5,
        atol=1e-5,
    )
    options: dict[str, Any] = {"max_new_tokens": STEPS, "do_sample": False}
    ours = tiny_llava.generate(**prompt, **cache_argument(tiny_llava, PolicyCache(tiny_llava, H2O())), **options)
    assert ours.tolist() == stock.generate(**prompt, **options).tolist()
    cache = PolicyCache(tiny_llava, H2O(), Budget(fraction=0.5))
    tiny_llava.generate(**prompt, **cache_argument(tiny_llava, cache), **options)
    assert cache.occupancy().entries_peak == (PROMPT + STEPS - 1) // 2


def test_a_cache_may_be_left_out(tiny_llama: Any) -> None:
    """Without a cache the attention function is plain causal attention, with left pads too."""
    stock = tiny_model("llama_gqa", attached=False)
    tokens, mask = random_tokens(0, 2, PROMPT), torch.ones(2, PROMPT, dtype=torch.int64)
    mask[1, :5] = 0
    with torch.no_grad():
        ours = tiny_llama(tokens, attention_mask=mask, use_cache=False).logits
        theirs = stock(tokens, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[1, 5:], theirs[1, 5:], rtol=1e-5, atol=1e-5)
