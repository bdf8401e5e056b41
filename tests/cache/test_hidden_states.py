"""What a layer's attention is given, told to policies that ask for it, and what they note of each token when it comes.

The reference is a stock model's own: its residual stream through the layer's norm. In the first layer that hangs on the
token alone, so what is noted there is known of every entry, whatever was evicted, moved or merged since.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from kvbench.cache import UNLIMITED, Budget, Needs, PolicyCache, ScorePolicy, View, When, cache_argument
from kvbench.cache.recording import PromptRecorder, cache_after
from kvbench.contract.driving import drive
from kvbench.errors import ModelSupportError, PolicyError
from kvbench.kernels.dispatch import interpreted, kernels_forced, triton_installed
from kvbench.policies.allocation.ada import Ada
from kvbench.policies.h2o import H2O
from kvbench.policies.merge.voronoi import Voronoi
from tests.tiny_models import random_tokens, tiny_model

PROMPT, STEPS = 23, 11
NO_KERNELS = pytest.mark.skipif(not (triton_installed() and interpreted()), reason="kernels run interpreted here")
FORCED = [False, pytest.param(True, marks=[pytest.mark.long, NO_KERNELS])]


@dataclass(frozen=True, kw_only=True)
class Hearing(ScorePolicy):
    """Notes one number of the hidden state for each head, and keeps the largest."""

    needs: ClassVar[Needs] = Needs.HIDDEN

    def note(self, view: View) -> Tensor:
        return view.hidden[..., : view.keys.shape[1]].transpose(1, 2)

    def score(self, view: View) -> Tensor:
        return view.noted


@dataclass(frozen=True, kw_only=True)
class HearingPrompts(Hearing):
    when: ClassVar[When] = When.PREFILL


def given_to(model: Any, tokens: Tensor) -> list[Tensor]:
    """(T, E) of each layer: the stock model's residual stream after the layer's norm."""
    with torch.no_grad():
        states = model(tokens, output_hidden_states=True, use_cache=False).hidden_states
        return [layer.input_layernorm(states[n])[0] for n, layer in enumerate(model.get_decoder().layers)]


def known(tokens: Tensor, heads: int) -> Tensor:
    """(H, T): what is to be noted in the first layer."""
    return given_to(tiny_model("llama_gqa", attached=False), tokens)[0][:, :heads].T


def noted_of(cache: PolicyCache, layer: int = 0) -> tuple[Tensor, Tensor]:
    slots = cache.policy_layers[layer].slots
    assert slots is not None
    assert slots.entries.noted is not None
    return slots.entries.position, slots.entries.noted


def check(cache: PolicyCache, rows: list[Tensor]) -> None:
    """Every entry that the first layer holds has the number that belongs to its token."""
    position, noted = noted_of(cache)
    for row, tokens in enumerate(rows):
        wanted = known(tokens[None], position.shape[1])
        for head in range(position.shape[1]):
            held = position[row, head] >= 0
            assert bool(held.any())
            torch.testing.assert_close(
                noted[row, head, held], wanted[head, position[row, head, held]], rtol=1e-5, atol=1e-6
            )


@pytest.mark.parametrize("name", ["llama_gqa", "llama_mha", "qwen2", "qwen3"])
def test_every_layer_hears_what_a_stock_models_projections_see_in_prompt_and_steps(name: str) -> None:
    model, tokens = tiny_model(name), random_tokens(3, 1, PROMPT + STEPS)
    cache = PolicyCache(model, Hearing(), UNLIMITED, reserve_tokens=STEPS)
    drive(model, cache, tokens, PROMPT)
    for layer, states in enumerate(given_to(tiny_model(name, attached=False), tokens)):
        position, noted = noted_of(cache, layer)
        for head in range(position.shape[1]):
            held = position[0, head] >= 0
            assert sorted(position[0, head, held].tolist()) == list(range(PROMPT + STEPS))
            wanted = states[position[0, head, held], head]
            torch.testing.assert_close(noted[0, head, held], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("by_kernels", FORCED)
@pytest.mark.parametrize(
    "policy",
    [
        Hearing(),
        Hearing(num_recent=2, allocation=Ada()),
        Hearing(every_tokens=3),
        HearingPrompts(),
        Hearing(merge=Voronoi()),
    ],
    ids=["plain", "ragged", "blocks", "prompt_only", "merged"],
)
def test_what_was_noted_stays_beside_its_token(policy: Hearing, by_kernels: bool) -> None:
    model, tokens = tiny_model("llama_gqa"), random_tokens(5, 1, PROMPT + STEPS)
    cache = PolicyCache(model, policy, Budget(tokens=9))  # buffers grow
    with kernels_forced(by_kernels):
        drive(model, cache, tokens, PROMPT)
    check(cache, [tokens[0]])


def test_rows_of_a_padded_batch_are_noted_as_alone_and_pads_count_nothing() -> None:
    model, rows = (
        tiny_model("llama_gqa"),
        [random_tokens(seed, n + STEPS) for seed, n in ((1, PROMPT), (2, 6), (3, 12))],
    )
    mask = torch.ones(3, PROMPT + STEPS, dtype=torch.int64)
    tokens = torch.zeros_like(mask)
    for index, row in enumerate(rows):
        pads = PROMPT + STEPS - len(row)
        mask[index, :pads] = 0
        tokens[index, pads:] = row
    cache = PolicyCache(model, Hearing(), Budget(tokens=7))
    drive(model, cache, tokens, PROMPT, mask)
    check(cache, rows)


@torch.no_grad()
def test_a_prompt_in_pieces_and_a_second_turn_are_noted_as_they_come() -> None:
    model, tokens = tiny_model("llama_gqa"), random_tokens(6, 1, 31)
    cache = PolicyCache(model, Hearing(), Budget(tokens=8), prompt_tokens=20)
    for start, end in ((0, 9), (9, 19), (19, 20), (20, 21), (21, 22), (22, 30), (30, 31)):
        model(tokens[:, start:end], **cache_argument(model, cache))
        check(cache, [tokens[0, :end]])


@torch.no_grad()
def test_an_answer_in_one_chunk_is_noted_as_its_tokens_one_by_one() -> None:
    model, tokens = tiny_model("llama_gqa"), random_tokens(7, 1, PROMPT + STEPS)
    for policy in (HearingPrompts(), HearingPrompts(num_recent=2, allocation=Ada())):
        cache = PolicyCache(model, policy, Budget(tokens=9), reserve_tokens=STEPS)
        model(tokens[:, :PROMPT], **cache_argument(model, cache))
        cache.expect_answer(STEPS)
        model(tokens[:, PROMPT:], **cache_argument(model, cache))
        check(cache, [tokens[0]])


@torch.no_grad()
def test_a_cache_from_a_recording_has_the_same_notes() -> None:
    model, tokens = tiny_model("llama_gqa"), random_tokens(8, 2, PROMPT)
    recorder = PromptRecorder(model, [H2O(), Hearing()])
    model(tokens, **cache_argument(model, recorder))
    recorded = cache_after(recorder.prompt, PolicyCache(model, Hearing(), Budget(tokens=6)))
    own = PolicyCache(model, Hearing(), Budget(tokens=6))
    model(tokens, **cache_argument(model, own))
    for layer in range(2):
        for one, other in zip(noted_of(recorded, layer), noted_of(own, layer), strict=True):
            assert torch.equal(one, other)


def test_notes_are_counted_as_statistics_and_hidden_states_are_not_kept() -> None:
    model, tokens = tiny_model("llama_gqa"), random_tokens(9, 1, PROMPT)
    cache = PolicyCache(model, Hearing(), Budget(tokens=9), reserve_tokens=STEPS)
    drive(model, cache, tokens, PROMPT)
    slots = cache.policy_layers[0].slots
    assert slots is not None
    assert cache.occupancy().statistics_bytes == 2 * 2 * slots.capacity * 4  # layers, heads, slots, float32
    assert all(layer.arriving is None for layer in cache.policy_layers)


def test_only_a_cache_that_asks_is_told_and_the_model_is_let_alone_afterwards() -> None:
    model, tokens = tiny_model("llama_gqa"), random_tokens(9, 1, PROMPT)
    modules = [layer.self_attn for layer in model.get_decoder().layers]

    def hooks() -> int:
        return sum(len(module._forward_pre_hooks) for module in modules)

    before = hooks()
    other = PolicyCache(model, H2O(), Budget(tokens=9))
    assert hooks() == before
    first, second = (PolicyCache(model, Hearing(), Budget(tokens=9)) for _ in range(2))
    assert hooks() == before + 4
    drive(model, first, tokens, PROMPT)
    drive(model, other, tokens, PROMPT)
    assert second.policy_layers[0].arriving is None
    assert other.policy_layers[0].arriving is None
    del first, second
    gc.collect()
    assert hooks() == before


def test_a_model_whose_attention_is_not_found_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama_gqa")
    monkeypatch.setattr(type(model), "get_decoder", lambda self: object())
    with pytest.raises(ModelSupportError, match=r"layers\.N\.self_attn.*use another policy") as caught:
        PolicyCache(model, Hearing(), Budget(tokens=4))
    assert "\n" not in str(caught.value)


@dataclass(frozen=True, kw_only=True)
class ReadsLater(ScorePolicy):
    needs: ClassVar[Needs] = Needs.HIDDEN

    def score(self, view: View) -> Tensor:
        return view.hidden[..., 0][:, None]


@dataclass(frozen=True, kw_only=True)
class NotesTooFew(Hearing):
    def note(self, view: View) -> Tensor:
        return view.hidden[:, :1, :1]


@dataclass(frozen=True, kw_only=True)
class NotesNothing(ScorePolicy):
    def score(self, view: View) -> Tensor:
        return view.noted


@pytest.mark.parametrize(
    ("policy", "told"),
    [
        (ReadsLater(), r"Needs\.HIDDEN"),
        (NotesTooFew(), r"NotesTooFew\.note returned shape \(1, 1, 1\); it must be"),
        (NotesNothing(), r"reads view\.noted, but its class has no `note`"),
    ],
)
def test_a_policy_that_reads_or_notes_otherwise_is_told_so(policy: ScorePolicy, told: str) -> None:
    model = tiny_model("llama_gqa")
    with pytest.raises(PolicyError, match=told):
        drive(model, PolicyCache(model, policy, Budget(tokens=4)), random_tokens(1, 1, PROMPT), PROMPT)
