"""The second pass over a prompt, against a stock model that reads prompt and repetition as one text."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvbench.cache import UNLIMITED, Budget, PolicyCache, ScorePolicy, View, cache_argument
from kvbench.cache.second_pass import OVERLAP_TOKENS, Instruction, read_again
from kvbench.config.build import build_cell
from kvbench.config.compose import compose_grid
from kvbench.contract.driving import drive, held_positions, left_padded
from kvbench.errors import ConfigError, ModelSupportError, PolicyError
from kvbench.models.loader import LoadedModel
from kvbench.policies.kvzip import KVzip
from kvbench.policies.kvzip_plus import KVzipPlus
from kvbench.tasks.decode import CacheSetting
from tests.covering import share_of
from tests.tiny_models import random_tokens, tiny_model

ASKS = Instruction(first=(5, 6, 7), later=(8, 9), end=(4,))
CHUNK = 7
seen_scores: list[Tensor] = []


@dataclass(frozen=True, kw_only=True)
class Noting(KVzip):
    """KVzip in short chunks, whose scores can be looked at."""

    repeat_tokens: ClassVar[int] = CHUNK

    def score(self, view: View) -> Tensor:
        if view.repeated_or_none is not None and len(seen_scores) < view.num_layers:
            seen_scores.append(view.repeated.clone())
        return super().score(view)


@dataclass(frozen=True, kw_only=True)
class NotingPlus(KVzipPlus):
    """KVzip+ in short chunks, whose scores can be looked at."""

    repeat_tokens: ClassVar[int] = CHUNK

    def score(self, view: View) -> Tensor:
        if view.repeated_or_none is not None and len(seen_scores) < view.num_layers:
            seen_scores.append(view.repeated.clone())
        return super().score(view)


def prefilled(
    policy: ScorePolicy, tokens: Tensor, mask: Tensor | None = None, budget: Budget | None = None
) -> PolicyCache:
    model, cache = tiny_model("llama_gqa"), PolicyCache(tiny_model("llama_gqa"), policy, budget or Budget(tokens=6))
    positions = None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        model(tokens, attention_mask=mask, position_ids=positions, **cache_argument(model, cache))
    return cache


def reference(prompt: list[int], num_sinks: int, chunk: int, *, by_output: bool = False) -> Tensor:
    """(L, H, T): the largest share of attention, from a stock model that is shown prompt and repetition as one text.

    by_output: each share times |W_o v| of the entry, over |h| of the query.
    """
    stock = copy.deepcopy(tiny_model("llama_gqa", attached=False))
    stock.set_attn_implementation("eager")
    worth = torch.zeros(2, 2, len(prompt))
    for start in range(0, len(prompt), chunk):
        part = prompt[start : start + chunk]
        asked = list(ASKS.later) + prompt[max(0, start - OVERLAP_TOKENS) : start] if start else list(ASKS.first)
        text = torch.tensor([[*prompt, *asked, *ASKS.end, *part]])
        with torch.no_grad():
            out = stock(text, output_attentions=True, output_hidden_states=True)
        rows = torch.stack(out.attentions)[:, 0, :, len(prompt) :]
        shown = torch.zeros(text.shape[1], dtype=torch.bool)
        shown[: min(num_sinks, len(prompt))] = True
        shown[start : start + len(part)] = True
        shown[len(prompt) :] = True
        rows = rows * shown
        rows = rows / rows.sum(dim=-1, keepdim=True)
        for layer, states in enumerate(out.hidden_states[:-1] if by_output else ()):
            block = stock.model.layers[layer]
            with torch.no_grad():
                given = block.input_layernorm(states)[0]
                values = block.self_attn.v_proj(given).unflatten(-1, (2, 8))
                for head in range(4):
                    moved = values[:, head // 2] @ block.self_attn.o_proj.weight[:, 8 * head : 8 * head + 8].T
                    rows[layer, head] *= moved.norm(dim=-1) / given[len(prompt) :].norm(dim=-1)[:, None]
        largest = rows.amax(dim=2).unflatten(1, (2, 2)).amax(dim=2)
        worth[..., start : start + len(part)] = largest[..., start : start + len(part)]
    return worth


@settings(max_examples=share_of(20), deadline=None)
@given(seed=st.integers(0, 2**20), length=st.integers(9, 26), num_sinks=st.integers(0, 5))
def test_scores_are_the_largest_shares_of_attention_while_the_prompt_is_repeated(
    seed: int, length: int, num_sinks: int
) -> None:
    seen_scores.clear()
    tokens = random_tokens(seed, 1, length)
    cache = prefilled(Noting(num_sinks=num_sinks), tokens)
    assert cache.awaits_second_pass
    read_again(tiny_model("llama_gqa"), cache, tokens, instruction=ASKS)
    assert not cache.awaits_second_pass
    wanted = reference(tokens[0].tolist(), num_sinks, CHUNK)
    torch.testing.assert_close(torch.stack(seen_scores)[:, 0], wanted, rtol=1e-4, atol=1e-5)


@settings(max_examples=share_of(12), deadline=None)
@given(seed=st.integers(0, 2**20), length=st.integers(9, 26))
def test_shares_count_by_what_they_do_to_the_output_where_a_policy_asks_for_that(seed: int, length: int) -> None:
    seen_scores.clear()
    tokens = random_tokens(seed, 1, length)
    cache = prefilled(NotingPlus(), tokens)
    read_again(tiny_model("llama_gqa"), cache, tokens, instruction=ASKS)
    wanted = reference(tokens[0].tolist(), 4, CHUNK, by_output=True)
    torch.testing.assert_close(torch.stack(seen_scores)[:, 0], wanted, rtol=1e-4, atol=1e-5)


def test_a_row_is_repeated_alike_alone_and_in_a_padded_batch() -> None:
    rows = [random_tokens(seed, length) for seed, length in ((1, 23), (2, 15), (3, 9))]
    tokens, mask = left_padded(rows)
    together = prefilled(Noting(), tokens, mask)
    read_again(tiny_model("llama_gqa"), together, tokens, mask, instruction=ASKS)
    held = held_positions(together)
    for number, row in enumerate(rows):
        alone = prefilled(Noting(), row[None])
        read_again(tiny_model("llama_gqa"), alone, row[None], instruction=ASKS)
        assert [layer[0] for layer in held_positions(alone)] == [layer[number] for layer in held]


def test_a_row_that_has_not_begun_yet_changes_nothing_for_the_others() -> None:
    begun, tokens = random_tokens(1, 1, 23), random_tokens(1, 1, 23).repeat(2, 1)
    mask = torch.ones_like(tokens)
    mask[1] = 0
    together, alone = prefilled(Noting(), tokens, mask), prefilled(Noting(), begun)
    read_again(tiny_model("llama_gqa"), together, tokens, mask, instruction=ASKS)
    read_again(tiny_model("llama_gqa"), alone, begun, instruction=ASKS)
    held = held_positions(together)
    assert [layer[0] for layer in held] == [layer[0] for layer in held_positions(alone)]
    assert not any(head for layer in held for head in layer[1])


def test_nothing_of_the_second_pass_stays() -> None:
    tokens = random_tokens(4, 1, 30)
    cache = prefilled(KVzip(), tokens, budget=Budget(tokens=11))
    read_again(tiny_model("llama_gqa"), cache, tokens, instruction=ASKS)
    assert all(layer.ledger.seen == [30] for layer in cache.policy_layers)
    assert all(max(head) < 30 and len(head) == 11 for layer in held_positions(cache) for head in layer[0])
    once = drive(tiny_model("llama_gqa"), PolicyCache(tiny_model("llama_gqa"), KVzip(), Budget(tokens=11)), tokens, 30)
    full = drive(tiny_model("llama_gqa"), PolicyCache(tiny_model("llama_gqa"), KVzip()), tokens, 30)
    assert torch.equal(once.prompt_logits, full.prompt_logits)


def test_a_prompt_within_the_budget_is_not_repeated() -> None:
    assert not prefilled(KVzip(), random_tokens(4, 1, 12), budget=UNLIMITED).awaits_second_pass
    assert not prefilled(KVzip(), random_tokens(4, 1, 12), budget=Budget(tokens=12)).awaits_second_pass


def test_tokens_that_come_before_the_second_pass_are_refused_in_one_line() -> None:
    model, cache = tiny_model("llama_gqa"), prefilled(KVzip(), random_tokens(4, 1, 12))
    with pytest.raises(PolicyError, match=r"KVzip has the prompt repeated .*read_again") as caught:
        model(random_tokens(5, 1, 1), **cache_argument(model, cache))
    assert "\n" not in str(caught.value)


def loaded_tiny(beats: list[int]) -> LoadedModel:
    return LoadedModel(
        model=tiny_model("llama_gqa"),
        processor=None,
        tokenizer=None,
        device=torch.device("cpu"),
        image_token_id=None,
        beat=lambda: beats.append(1),
    )


def batch_of(tokens: Tensor, **more: Any) -> Any:
    from kvbench.models.inputs import PromptBatch

    tensors = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    return PromptBatch(tensors=tensors, kind=torch.zeros_like(tokens, dtype=torch.int8), row_seeds=(0,), **more)


@torch.inference_mode()
def test_a_task_repeats_the_prompt_before_its_first_step_and_a_question_after_the_cut_stays() -> None:
    setting, beats = CacheSetting(policy=KVzip(), budget=Budget(tokens=10), positions="original"), list[int]()
    decoding = setting.decoding(loaded_tiny(beats), batch_of(random_tokens(3, 1, 30)), 4)
    assert len(beats) == 2  # the prompt and its repetition
    assert all(len(head) == 10 for layer in held_positions(decoding.cache) for head in layer[0])
    asked = batch_of(random_tokens(3, 1, 30), question_ids=random_tokens(6, 1, 5))
    decoding = setting.decoding(loaded_tiny(beats), asked, 4)
    assert all({*range(30, 35)} <= set(head) for layer in held_positions(decoding.cache) for head in layer[0])
    short = batch_of(random_tokens(3, 1, 8), question_ids=random_tokens(6, 1, 5))  # over the budget with its question
    decoding = setting.decoding(loaded_tiny(beats), short, 4)
    assert all(len(head) == 10 for layer in held_positions(decoding.cache) for head in layer[0])


@torch.inference_mode()
def test_a_prompt_with_pictures_is_refused_in_one_line() -> None:
    setting = CacheSetting(policy=KVzip(), budget=Budget(tokens=10), positions="original")
    batch = batch_of(random_tokens(3, 1, 30))
    decoding = setting.decoding(loaded_tiny([]), batch, 4)
    decoding._has_pictures = True
    decoding.cache = prefilled(KVzip(), random_tokens(3, 1, 30))
    with pytest.raises(ModelSupportError, match="KVzip has the prompt repeated as text"):
        decoding._read_again()
    (composed,) = compose_grid(["policy=kvzip", "dataset=scenes", "task=perplexity"], multirun=False, config_dir=None)
    with pytest.raises(ConfigError, match="the data set shows pictures"):
        build_cell(composed)
