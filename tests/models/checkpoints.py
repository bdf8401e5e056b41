"""Tiny random checkpoints written to a folder in Hugging Face format, with a tokenizer trained on the spot."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from kvbench.bundled.tiny_llava import CHAT_TEMPLATE, train_tokenizer
from tests.models.vision_checkpoints import VISION_CHECKPOINTS

WITH_BOS = (
    "{{ bos_token }}{% for message in messages %}[INST] {{ message['content'] }} [/INST]{% endfor %}"
    "{% if add_generation_prompt %}{% endif %}"
)
WITH_LINES = (
    "{% for message in messages %}<|user|>\n{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
_TEXT_FAMILIES: dict[str, tuple[type[Any], type[Any], str | None]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, WITH_BOS),
    "mistral": (MistralForCausalLM, MistralConfig, WITH_BOS),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, WITH_LINES),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, None),
}
FAMILIES = (*_TEXT_FAMILIES, "llava", *VISION_CHECKPOINTS)
IN_CACHE_FAMILIES = (*_TEXT_FAMILIES, "llava", "llava_next", "llava_onevision")


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["What is it? A small red dot in row one, column two.", "There are four objects."])


def save_checkpoint(family: str, folder: Path) -> Path:
    """Write a random model of `family` with tokenizer and, for some, a chat template; return the folder."""
    words = tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(11)
        if family in VISION_CHECKPOINTS:
            VISION_CHECKPOINTS[family](folder).save_pretrained(folder)
            return folder
        if family == "llava":
            _llava(words).save_pretrained(folder)
            _processor(words).save_pretrained(folder)
            return folder
        _, _, template = _TEXT_FAMILIES[family]
        text_model(family).save_pretrained(folder)
    words.chat_template = template
    words.save_pretrained(folder)
    words.chat_template = None
    return folder


def text_model(family: str, **changes: Any) -> Any:
    """Return a random model of a text family; `changes` are fields of its config."""
    model, config, _ = _TEXT_FAMILIES[family]
    more = {"sliding_window": None} if family == "mistral" else {}
    with torch.random.fork_rng():
        torch.manual_seed(11)
        return model(config(**{**_text(tokenizer()), **more, **changes}))


def _text(words: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "vocab_size": len(words),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "initializer_range": 0.3,
        "pad_token_id": words.pad_token_id,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "tie_word_embeddings": False,
    }


def _llava(words: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        initializer_range=0.3,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**_text(words)),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        image_seq_length=4,
    )
    return LlavaForConditionalGeneration(config)


def _processor(words: PreTrainedTokenizerFast) -> LlavaProcessor:
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return LlavaProcessor(
        image_processor=images,
        tokenizer=words,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
