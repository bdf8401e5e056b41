"""Tiny random checkpoints of the vision families beyond LLaVA-1.5, in the files that the published ones have."""

from __future__ import annotations

import base64
import json
from functools import cache
from pathlib import Path
from typing import Any

from transformers import (
    CLIPVisionConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipVisionConfig,
)

from kvbench.bundled.tiny_llava import CHAT_TEMPLATE, train_tokenizer
from kvbench.models.qwen_vl import QwenVLConfig, QwenVLForConditionalGeneration

PINPOINTS = [[16, 16], [16, 32], [32, 16], [32, 32]]
TOWER: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
    "initializer_range": 0.3,
}
GRID_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GRID_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def words(*more: str) -> PreTrainedTokenizerFast:
    """A tokenizer trained on the spot, with `more` special tokens at its end."""
    tokenizer = train_tokenizer(["What is it? A small red dot in row one, column two.", "There are four objects."])
    tokenizer.add_tokens(list(more), special_tokens=True)
    return tokenizer


def decoder(tokenizer: PreTrainedTokenizerFast, **changes: Any) -> dict[str, Any]:
    """Sizes of a tiny decoder with grouped-query attention and large weights."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "initializer_range": 0.3,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "tie_word_embeddings": False,
        **changes,
    }


def llava_next(folder: Path) -> PreTrainedModel:
    """LLaVA-NeXT over Mistral: tiles of 2 x 2 CLIP patches."""
    tokenizer = words()
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, image_grid_pinpoints=PINPOINTS
    )
    LlavaNextProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**TOWER),
        text_config=MistralConfig(**decoder(tokenizer, sliding_window=None)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        image_grid_pinpoints=PINPOINTS,
    )
    return LlavaNextForConditionalGeneration(config)


def llava_onevision(folder: Path) -> PreTrainedModel:
    """LLaVA-OneVision over Qwen2: at most four tiles' worth of SigLIP patches, then interpolated."""
    tokenizer = words("<video>")
    tokenizer.save_pretrained(folder)
    images = LlavaOnevisionImageProcessorPil(size={"height": 16, "width": 16}, image_grid_pinpoints=PINPOINTS)
    _publish(folder, images, "LlavaOnevisionImageProcessor")
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    vision = SiglipVisionConfig(**TOWER, vision_use_head=False)
    config = LlavaOnevisionConfig(
        vision_config=vision,
        text_config=Qwen2Config(**decoder(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio="anyres_max_2",
    )
    return LlavaOnevisionForConditionalGeneration(config)


def qwen2_5_vl(folder: Path) -> PreTrainedModel:
    """Qwen2.5-VL: window attention in the tower, positions in three blocks of frequencies."""
    tokenizer = _grid_files(folder, "Qwen2VLImageProcessor")
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    config = Qwen2_5_VLConfig(
        vision_config={
            **_grid_tower(out_hidden_size=64),
            "window_size": 16,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
            "initializer_range": 0.3,
        },
        text_config=decoder(tokenizer, hidden_size=64, rope_parameters=rope),
        **_grid_ids(tokenizer),
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def qwen3_vl(folder: Path) -> PreTrainedModel:
    """Qwen3-VL: features of the tower's first layer join the decoder, positions interleave."""
    tokenizer = _grid_files(folder, "Qwen2VLImageProcessorFast")
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    config = Qwen3VLConfig(
        vision_config={
            **_grid_tower(out_hidden_size=32),
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        text_config=decoder(tokenizer, rope_parameters=rope),
        **_grid_ids(tokenizer),
    )
    return Qwen3VLForConditionalGeneration(config)


def qwen(folder: Path) -> PreTrainedModel:
    """The original Qwen-VL-Chat with a training length of 32 tokens, so that prompts go beyond it."""
    ranks = [bytes([byte]) for byte in range(256)] + [b"What", b"is", b" is", b" it", b"\n\n"]
    lines = [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(ranks)]
    (folder / "qwen.tiktoken").write_bytes(b"\n".join(lines) + b"\n")
    start = len(ranks) + 3 + 205 + 6
    config = QwenVLConfig(
        vocab_size=start + 3,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        kv_channels=32,
        intermediate_size=96,
        initializer_range=0.15,
        seq_length=32,
        visual={
            "heads": 2,
            "image_size": 28,
            "image_start_id": start,
            "layers": 1,
            "mlp_ratio": 2.0,
            "n_queries": 4,
            "output_dim": 128,
            "patch_size": 7,
            "width": 32,
        },
    )
    model = QwenVLForConditionalGeneration(config)
    model.generation_config.chat_format = "chatml"
    return model


VISION_CHECKPOINTS = {
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "qwen": qwen,
}


@cache
def _grid_words() -> PreTrainedTokenizerFast:
    tokenizer = words(*GRID_TOKENS)
    tokenizer.chat_template = GRID_TEMPLATE
    return tokenizer


def _grid_files(folder: Path, image_processor_type: str) -> PreTrainedTokenizerFast:
    tokenizer = _grid_words()
    tokenizer.save_pretrained(folder)
    images = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 64, "longest_edge": 1024}
    )
    _publish(folder, images, image_processor_type)
    return tokenizer


def _grid_tower(**changes: Any) -> dict[str, Any]:
    sizes = {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, **changes}
    return {**sizes, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}


def _grid_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    start, end, image, video = (tokenizer.convert_tokens_to_ids(token) for token in GRID_TOKENS[2:])
    ids = {"vision_start_token_id": start, "vision_end_token_id": end, "image_token_id": image, "video_token_id": video}
    return {**ids, "tie_word_embeddings": False}


def _publish(folder: Path, images: Any, name: str) -> None:
    """Save an image processor under the class name that published checkpoints have in their file."""
    images.save_pretrained(folder)
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "image_processor_type": name}))
