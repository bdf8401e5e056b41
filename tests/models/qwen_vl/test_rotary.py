from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvbench.cache import Budget, PolicyCache, ScorePolicy, View, attach, cache_argument
from kvbench.cache.positions import Rotation
from kvbench.cache.recording import PromptRecorder, cache_after
from kvbench.contract.driving import drive, held_positions
from kvbench.errors import ModelSupportError
from kvbench.models.qwen_vl import DynamicRotary, QwenVLConfig, QwenVLForConditionalGeneration, query_scale, turned
from kvbench.policies.full import Full
from tests.models.qwen_vl.golden_model import CONFIG, TRAINED_TOKENS

WIDTH = 32


class Early(ScorePolicy):
    """Keep the oldest tokens, so that positions and places in the cache drift apart at once."""

    def score(self, view: View) -> torch.Tensor:
        return -view.position.float()


def rotary(**changes: Any) -> DynamicRotary:
    return DynamicRotary(QwenVLConfig(**{**CONFIG, **changes}))


@given(tokens=st.integers(min_value=1, max_value=40_000))
def test_the_stretch_doubles_with_every_doubling_of_the_prompt(tokens: int) -> None:
    got = float(rotary().stretch(torch.tensor([tokens]))[0])
    doublings = 0
    while TRAINED_TOKENS * 2**doublings < tokens:
        doublings += 1
    assert got == (2 ** (doublings + 1) - 1 if tokens > TRAINED_TOKENS else 1)


@given(position=st.integers(min_value=0, max_value=2**30), seed=st.integers(min_value=0, max_value=9))
def test_a_turn_is_a_complex_product(position: int, seed: int) -> None:
    position %= 5000
    states = torch.randn(1, 1, 1, WIDTH, generator=torch.Generator().manual_seed(seed))
    cos, sin = rotary()(torch.tensor([[position]]), torch.tensor([7.0], dtype=torch.float64))
    base = 10000 * 7.0 ** (WIDTH / (WIDTH - 2))
    for pair, value in enumerate(states[0, 0, 0, : WIDTH // 2].tolist()):
        number = complex(value, float(states[0, 0, 0, WIDTH // 2 + pair]))
        angle = position * base ** (-2 * pair / WIDTH)
        expected = number * complex(math.cos(angle), math.sin(angle))
        got = turned(states, cos, sin)[0, 0, 0]
        assert math.isclose(float(got[pair]), expected.real, abs_tol=5e-3)
        assert math.isclose(float(got[WIDTH // 2 + pair]), expected.imag, abs_tol=5e-3)


@given(position=st.integers(min_value=0, max_value=100_000))
def test_queries_grow_with_the_logarithm_beyond_the_training_length(position: int) -> None:
    got = float(query_scale(torch.tensor([[position]]), TRAINED_TOKENS))
    assert math.isclose(got, max(1.0, math.log(position + 1, TRAINED_TOKENS)), rel_tol=1e-6)


def test_both_can_be_switched_off() -> None:
    assert rotary(use_dynamic_ntk=False).stretch(torch.tensor([9 * TRAINED_TOKENS])).tolist() == [1.0]
    model, ids = random_model(use_logn_attn=False), torch.arange(3 * TRAINED_TOKENS)[None]
    scaled = random_model(use_logn_attn=True)
    with torch.inference_mode():
        difference = (model(ids).logits - scaled(ids).logits).abs().amax(dim=-1)[0]
    assert float(difference[:TRAINED_TOKENS].max()) < 1e-4
    assert float(difference[TRAINED_TOKENS + 8 :].min()) > 1e-3


def random_model(**changes: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return QwenVLForConditionalGeneration(QwenVLConfig(**CONFIG, initializer_range=0.1, **changes)).eval()


def test_a_row_is_rotated_by_its_own_length_whatever_the_batch_is_padded_to() -> None:
    model = random_model()
    attach(model)
    tokens = torch.randint(0, 290, (1, TRAINED_TOKENS - 2), generator=torch.Generator().manual_seed(1))
    padded = torch.cat((torch.zeros(1, 20, dtype=torch.int64), tokens), dim=1)
    mask = torch.cat((torch.zeros(1, 20, dtype=torch.int64), torch.ones_like(tokens)), dim=1)
    with torch.inference_mode():
        alone, beside = model(tokens).logits, model(padded, attention_mask=mask).logits[:, 20:]
    torch.testing.assert_close(alone, beside, rtol=1e-5, atol=1e-5)


def test_eviction_moves_neither_positions_nor_scales_nor_frequencies() -> None:
    """A cut cache equals the full one whose evicted columns are hidden: nothing counts what is left in the cache."""
    model, prompt = random_model(), 2 * TRAINED_TOKENS + 6
    tokens = torch.randint(0, 290, (1, prompt + 6), generator=torch.Generator().manual_seed(2))
    attach(model)
    cut = drive(model, PolicyCache(model, Early(num_recent=1), Budget(tokens=20)), tokens, prompt)
    full = PolicyCache(model, Full())
    drive(model, full, tokens[:, :prompt], prompt)
    for step, logits in enumerate(cut.logits):
        for layer, held in zip(full.policy_layers, cut.held[step], strict=True):
            hide(layer, held[0])
        with torch.no_grad():
            output = model(tokens[:, prompt + step : prompt + step + 1], **cache_argument(model, full))
        torch.testing.assert_close(output.logits[:, -1], logits, rtol=1e-4, atol=1e-4)
    assert max(len(head) for layer in held_positions(cut.cache) for head in layer[0]) == 20


@torch.inference_mode()
def test_after_a_shared_prompt_an_answer_goes_on_with_the_frequencies_of_the_prompt() -> None:
    """The answer begins where the stretch of a longer prompt would be another one."""
    model, prompt = random_model(), 2 * TRAINED_TOKENS
    attach(model)
    tokens = torch.randint(0, 290, (1, prompt + 6), generator=torch.Generator().manual_seed(4))
    own = drive(model, PolicyCache(model, Early(), Budget(tokens=20)), tokens, prompt)
    recorder = PromptRecorder(model, [Early()])
    model(tokens[:, :prompt], **cache_argument(model, recorder))
    shared = cache_after(recorder.prompt, PolicyCache(model, Early(), Budget(tokens=20)))
    for step, logits in enumerate(own.logits):
        new = tokens[:, prompt + step : prompt + step + 1]
        assert torch.equal(model(new, **cache_argument(model, shared)).logits[:, -1], logits), step


def hide(layer: Any, kept: list[tuple[int, ...]]) -> None:
    """Take out of the full cache's sight what the cut one no longer holds, head by head."""
    position = layer.slots.entries.position
    for head, held in enumerate(kept):
        gone = ~torch.isin(position[0, head], torch.tensor(held)) & (position[0, head] >= 0)
        layer.slots.entries.keys[0, head, gone] = 0
        position[0, head, gone] = -1


def test_a_turn_by_a_difference_is_the_models_own_rotation_within_the_training_length() -> None:
    frequencies, most_tokens = rotary().fixed_rotation()
    assert most_tokens == TRAINED_TOKENS
    states, stretch = torch.randn(1, 1, 1, WIDTH), torch.ones(1, dtype=torch.float64)
    stood, stands = (turned(states, *rotary()(torch.tensor([[place]]), stretch)) for place in (5, 19))
    moved = Rotation(frequencies=frequencies).turn(stood, torch.tensor([[[14]]]))
    torch.testing.assert_close(moved, stands, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("positions", ["in_cache", "released"])
def test_other_position_modes_give_the_full_caches_logits_where_nothing_is_evicted(positions: Any) -> None:
    model = random_model()
    attach(model)
    tokens = torch.randint(5, 90, (2, TRAINED_TOKENS), generator=torch.Generator().manual_seed(3))
    traces = [
        drive(model, PolicyCache(model, Full(), positions=mode), tokens, TRAINED_TOKENS - 6)
        for mode in ("original", positions)
    ]
    torch.testing.assert_close(torch.stack(traces[1].logits), torch.stack(traces[0].logits), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("positions", ["in_cache", "released"])
@pytest.mark.parametrize("prompt_tokens", [TRAINED_TOKENS + 1, TRAINED_TOKENS])
def test_other_position_modes_are_refused_beyond_the_training_length(positions: Any, prompt_tokens: int) -> None:
    model = random_model()
    attach(model)
    cache = PolicyCache(model, Early(), Budget(fraction=0.5), positions=positions)
    tokens = torch.randint(5, 90, (1, TRAINED_TOKENS + 1))
    with pytest.raises(ModelSupportError, match=rf"seen {TRAINED_TOKENS + 1} tokens.*or positions=original"):
        drive(model, cache, tokens, prompt_tokens)
