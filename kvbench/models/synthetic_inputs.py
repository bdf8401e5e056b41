"""Prompts of random token ids and random pictures, for a model without tokenizer and processor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvbench.datasets.base import TokenPrompt
from kvbench.errors import DataError
from kvbench.models.loader import LoadedModel
from kvbench.models.spec import image_tokens

_BEFORE_IMAGE_TOKENS = 1  # as a begin token stands before the picture


def synthetic_tensors(loaded: LoadedModel, prompts: Sequence[TokenPrompt]) -> dict[str, Tensor]:
    """Return input_ids and attention_mask (B, T), and pixel_values (B, 3, S, S) where there are pictures.

    Ids are uniform over the vocabulary without the image token, pictures standard normal; both are
    drawn on the CPU, so every device gets the same. Raises: DataError for a prompt too short for its
    picture, or prompts of different lengths or kinds in one batch.
    """
    config = loaded.model.config
    if len({(prompt.num_tokens, prompt.num_images) for prompt in prompts}) > 1:
        raise DataError("synthetic prompts of one batch must have one length and one number of pictures")
    with_image = bool(loaded.takes_images if prompts[0].num_images is None else prompts[0].num_images)
    num_image_tokens = image_tokens(config.to_dict()) if with_image else 0
    if with_image and prompts[0].num_tokens < num_image_tokens + 2:
        raise DataError(
            f"a prompt of {prompts[0].num_tokens} tokens has no room for a picture of {num_image_tokens} and text"
        )
    generators = [torch.Generator().manual_seed(prompt.seed) for prompt in prompts]
    rows = [_ids(loaded, prompt, number, num_image_tokens) for prompt, number in zip(prompts, generators, strict=True)]
    ids = torch.stack(rows).to(loaded.device)
    tensors = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if with_image:
        pixels = torch.stack([_pixels(config.vision_config, generator) for generator in generators])
        tensors["pixel_values"] = pixels.to(loaded.device, loaded.model.dtype)
    return tensors


def _ids(loaded: LoadedModel, prompt: TokenPrompt, generator: torch.Generator, num_image_tokens: int) -> Tensor:
    size = loaded.model.config.get_text_config().vocab_size
    image_id = loaded.image_token_id
    if image_id is None or not 0 <= image_id < size:
        return torch.randint(size, (prompt.num_tokens,), generator=generator)
    ids = torch.randint(size - 1, (prompt.num_tokens,), generator=generator)
    ids += ids >= image_id
    ids[_BEFORE_IMAGE_TOKENS : _BEFORE_IMAGE_TOKENS + num_image_tokens] = image_id
    return ids


def _pixels(vision: Any, generator: torch.Generator) -> Tensor:
    return torch.randn(vision.num_channels, vision.image_size, vision.image_size, generator=generator)
