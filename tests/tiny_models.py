"""Tiny random models, made from a seed; large weights, so that logits differ and attention is uneven."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from kvbench.cache import attach

VOCABULARY = 97
IMAGE_TOKEN = 96
IMAGE_TOKENS = 4
_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "head_dim": 8,
    "max_position_embeddings": 4096,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
    "initializer_range": 0.3,
}


def _text(**changes: Any) -> dict[str, Any]:
    return {**_TEXT, **changes}


def _build(name: str) -> PreTrainedModel:
    if name == "llama_gqa":
        return LlamaForCausalLM(LlamaConfig(**_text(num_attention_heads=4, num_key_value_heads=2)))
    if name == "llama_gqa_8_2":
        return LlamaForCausalLM(LlamaConfig(**_text(num_attention_heads=8, num_key_value_heads=2)))
    if name == "llama_mha":
        return LlamaForCausalLM(LlamaConfig(**_text(num_attention_heads=4, num_key_value_heads=4)))
    if name == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**_text(num_attention_heads=4, num_key_value_heads=2)))
    if name == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**_text(num_attention_heads=4, num_key_value_heads=2)))
    text = LlamaConfig(**_text(num_attention_heads=4, num_key_value_heads=2))
    config = LlavaConfig(vision_config=CLIPVisionConfig(**_VISION), text_config=text, image_token_index=IMAGE_TOKEN)
    return LlavaForConditionalGeneration(config)


@cache
def tiny_model(name: str, *, attached: bool = True, double: bool = False) -> Any:
    """Return the model `name` in eval mode; the same weights whether attached to kvbench's attention or not."""
    # Whoever asks first may be in inference mode, whose tensors others could not use.
    with torch.random.fork_rng(), torch.inference_mode(False):
        torch.manual_seed(7)
        model = _build(name).eval()
    if double:
        model = model.double()
    model.generation_config.pad_token_id = 0
    if attached:
        attach(model)
    return model


def random_tokens(seed: int, *shape: int) -> torch.Tensor:
    """Return token ids without pads and without picture tokens."""
    return torch.randint(2, IMAGE_TOKEN, shape, generator=torch.Generator().manual_seed(seed))
