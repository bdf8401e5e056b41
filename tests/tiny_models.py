"""The contract's tiny text models, and a LLaVA made of one."""

from __future__ import annotations

from functools import cache
from typing import Any

from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from kvbench.cache import attach
from kvbench.contract import driving
from kvbench.contract.driving import PICTURE_TOKEN, TEXT_SETTINGS, seeded
from kvbench.contract.driving import VOCABULARY as VOCABULARY
from kvbench.contract.driving import random_tokens as random_tokens
from kvbench.contract.driving import text_model as text_model

IMAGE_TOKEN = PICTURE_TOKEN
IMAGE_TOKENS = 4
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
    "initializer_range": 0.3,
}


def _llava() -> LlavaForConditionalGeneration:
    text = LlamaConfig(**TEXT_SETTINGS, num_attention_heads=4, num_key_value_heads=2)
    config = LlavaConfig(vision_config=CLIPVisionConfig(**_VISION), text_config=text, image_token_index=IMAGE_TOKEN)
    return LlavaForConditionalGeneration(config)


@cache
def _tiny_llava(attached: bool) -> Any:
    model = seeded(_llava)
    if attached:
        attach(model)
    return model


def tiny_model(name: str, *, attached: bool = True, double: bool = False) -> Any:
    """Return the model `name` in eval mode; the same weights whether attached to kvbench's attention or not."""
    if name == "llava":
        return _tiny_llava(attached)
    return driving.tiny_model(name, attached=attached, double=double)
