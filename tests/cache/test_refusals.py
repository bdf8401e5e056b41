"""What is not supported is refused, with the way out."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from kvbench.cache import PolicyCache, attach, cache_argument
from kvbench.cache.attention import _left_pads
from kvbench.contract.driving import drive
from kvbench.errors import ConfigError, ModelSupportError
from kvbench.policies.h2o import H2O
from kvbench.policies.streaming_llm import StreamingLLM
from tests.tiny_models import random_tokens, text_model, tiny_model

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def test_a_model_without_attach_is_refused() -> None:
    stock = tiny_model("llama_gqa", attached=False)
    with pytest.raises(ModelSupportError, match="attach"):
        PolicyCache(stock, H2O())


def test_layers_with_sliding_windows_are_refused() -> None:
    config = Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    with pytest.raises(ModelSupportError, match="sliding"):
        attach(Qwen2ForCausalLM(config))


def test_a_model_that_slides_in_every_layer_is_refused() -> None:
    model = MistralForCausalLM(MistralConfig(**SMALL, sliding_window=4)).eval()
    with pytest.raises(ModelSupportError, match="sliding"):
        attach_and_run(model)


def attach_and_run(model: Any) -> None:
    attach(model)
    model(random_tokens(0, 1, 8), **cache_argument(model, PolicyCache(model, H2O())))


@pytest.mark.parametrize("mask", [[1, 1, 1, 1, 1, 0], [0, 1, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0]])
def test_pads_that_do_not_stand_left_are_refused(tiny_llama: Any, mask: list[int]) -> None:
    with pytest.raises(ModelSupportError, match="left"):
        tiny_llama(
            random_tokens(0, 1, 6),
            attention_mask=torch.tensor([mask]),
            **cache_argument(tiny_llama, PolicyCache(tiny_llama, H2O())),
        )


@pytest.mark.parametrize("told", [6, 0])
def test_pads_inside_a_second_turn_are_refused(tiny_llama: Any, told: int) -> None:
    """Whether the mask covers everything seen or, wrongly, the new tokens only."""
    cache = PolicyCache(tiny_llama, H2O())
    tiny_llama(random_tokens(0, 1, 6), **cache_argument(tiny_llama, cache))
    mask = torch.tensor([[1] * told + [0, 1, 1]])
    with pytest.raises(ModelSupportError, match="left"):
        tiny_llama(random_tokens(1, 1, 3), attention_mask=mask, **cache_argument(tiny_llama, cache))


def test_a_mask_of_four_dimensions_is_refused(tiny_llama: Any) -> None:
    mask = torch.zeros(1, 1, 6, 6)
    with pytest.raises(ModelSupportError, match="4-dimensional"):
        tiny_llama(
            random_tokens(0, 1, 6), attention_mask=mask, **cache_argument(tiny_llama, PolicyCache(tiny_llama, H2O()))
        )


@pytest.mark.gpu
@pytest.mark.parametrize("mask", [[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
def test_without_a_cache_pads_may_stand_anywhere_outside_the_text(mask: list[int]) -> None:
    """Real tokens get what they get alone, also in half precision on a GPU, where left pads have their own kernel."""
    on, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
    model = copy.deepcopy(tiny_model("llama_gqa")).to(on, dtype)
    real = torch.tensor(mask, device=on).bool()
    tokens = random_tokens(0, 2, 6).to(on)
    place = (real.long().cumsum(-1) - 1).clamp(min=0).expand(2, -1)
    both = torch.stack((real, torch.ones_like(real))).long()
    padded = model(tokens, attention_mask=both, position_ids=place, use_cache=False).logits[0, real]
    alone = model(tokens[:1, real], use_cache=False).logits[0]
    torch.testing.assert_close(padded, alone, rtol=0.02 if on == "cuda" else 1e-4, atol=0.05 if on == "cuda" else 1e-4)


def test_which_pads_the_kernel_for_left_pads_takes() -> None:
    rows = {(-1, -1, 0, 1): (2, 0), (0, 1, 2, 3): (0, 0), (-1,) * 4: (4, 0), (0, 1, -1, -1): None, (-1, 0, 1, -1): None}
    for row, expected in rows.items():
        assert _left_pads(torch.tensor([row, (0, 1, 2, 3)])) == expected


def test_packed_sequences_are_refused(tiny_llama: Any) -> None:
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    with pytest.raises(ModelSupportError, match="packed"):
        tiny_llama(random_tokens(0, 1, 8), position_ids=positions, use_cache=False)


def test_a_foreign_cache_is_refused(tiny_llama: Any) -> None:
    with pytest.raises(ModelSupportError, match="PolicyCache"):
        drive(tiny_llama, DynamicCache(), random_tokens(0, 1, 8), 6)


def test_beam_search_is_refused(tiny_llama: Any) -> None:
    with pytest.raises(ModelSupportError, match="beam"):
        tiny_llama.generate(
            random_tokens(0, 1, 6),
            **cache_argument(tiny_llama, PolicyCache(tiny_llama, H2O())),
            num_beams=2,
            max_new_tokens=4,
        )


def test_training_with_dropout_is_refused() -> None:
    model = text_model("llama_gqa").train()
    model.config.attention_dropout = 0.1
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(ModelSupportError, match="dropout"):
        attach_and_run(model)


def test_positions_in_cache_need_one_fixed_rotation() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = Qwen2ForCausalLM(Qwen2Config(**SMALL, rope_parameters=rope)).eval()
    attach(model)
    PolicyCache(model, StreamingLLM())
    with pytest.raises(ModelSupportError, match="positions=original"):
        PolicyCache(model, StreamingLLM(), positions="in_cache")


def test_an_unknown_position_mode_names_the_close_one(tiny_llama: Any) -> None:
    with pytest.raises(ConfigError, match="in_cache"):
        PolicyCache(tiny_llama, H2O(), positions="incache")  # type: ignore[arg-type]


def test_a_kind_per_prompt_token_is_needed(tiny_llama: Any) -> None:
    cache = PolicyCache(tiny_llama, H2O(), prompt_kind=torch.zeros(1, 5, dtype=torch.int8))
    with pytest.raises(ModelSupportError, match="prompt_kind"):
        tiny_llama(random_tokens(0, 1, 6), **cache_argument(tiny_llama, cache))
