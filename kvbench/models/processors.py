"""The processor of each family of checkpoints, all of them able to take still pictures without torchvision.

Text and still pictures to model inputs, without torchvision.

transformers' own processors of families that also take video ask for torchvision even for a single
picture. This one joins the checkpoint's tokenizer, image processor and chat template itself: the
picture's place in the text is widened to as many image tokens as the picture has vectors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.utils import cached_file

from kvbench.errors import ModelSupportError
from kvbench.models.chat import default_template
from kvbench.models.qwen_vl.tokenizer import END_OF_TEXT, TURN_END, VOCABULARY_FILE, qwen_tokenizer
from kvbench.models.spec import GRID_FAMILIES, PORTED_FAMILIES, QWEN_CHATML, QWEN_RAW

CountTokens = Callable[[Mapping[str, Any]], list[int]]


@dataclass(kw_only=True)
class StillProcessor:
    """Tokenizer, image processor and template of one checkpoint.

    image_token_id: the token that stands for one vector of a picture. count_tokens: image tokens per
    picture, from what the image processor returned. marks_images: whether the model asks for
    mm_token_type_ids, 1 at image tokens and 0 elsewhere.
    """

    tokenizer: Any
    image_processor: Any
    image_token_id: int
    chat_template: str | None
    count_tokens: CountTokens
    marks_images: bool = False

    def apply_chat_template(self, chat: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """Return `chat` as the template writes it; each picture is one image token so far."""
        text: str = self.tokenizer.apply_chat_template(chat, chat_template=self.chat_template, **options)
        return text

    def __call__(
        self,
        *,
        text: Sequence[str],
        images: Sequence[Any] = (),
        return_tensors: str = "pt",
        padding: bool = True,
        add_special_tokens: bool = True,
    ) -> dict[str, Tensor]:
        """Return input_ids and attention_mask (B, T), and what the image processor gives for `images`.

        Pictures belong to the image tokens of `text` in order. Raises: ModelSupportError if the texts have too
        few, ValueError if one has too many.
        """
        pixels = dict(self.image_processor(images=list(images), return_tensors=return_tensors)) if images else {}
        widths = iter(self.count_tokens(pixels) if images else ())
        token = self.tokenizer.convert_ids_to_tokens(self.image_token_id)
        wide = [_widened(row, token, widths) for row in text]
        if next(widths, None) is not None:
            raise ModelSupportError(f"{len(images)} pictures, but fewer {token!r} in the prompts; check the template")
        encoded = self.tokenizer(
            wide, return_tensors=return_tensors, padding=padding, add_special_tokens=add_special_tokens
        )
        inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")} | pixels
        if self.marks_images:
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == self.image_token_id).int()
        return inputs


def _widened(text: str, token: str, widths: Iterator[int]) -> str:
    wide, *others = text.split(token)
    for part in others:
        width = next(widths, None)
        if width is None:
            raise ValueError(f"a prompt has more {token!r} than pictures")
        wide += token * width + part
    return wide


_CLIP_MEAN, _CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def vision_processor(source: str, model: Any, options: Mapping[str, Any]) -> Any:
    """Return the processor for the checkpoint `source`, a folder or a hub name, of the loaded `model`.

    options: revision and trust_remote_code. Raises: ModelSupportError if the checkpoint lacks a file.
    """
    family = model.config.model_type
    if family in PORTED_FAMILIES:
        return _qwen_vl(source, model.config, options)
    if family in GRID_FAMILIES:
        images = transformers.Qwen2VLImageProcessorPil.from_pretrained(source, **options)
        return _still(source, model.config, options, images, _grid_tokens(model.config), marks_images=True)
    if family == "llava_onevision":
        images = transformers.LlavaOnevisionImageProcessorPil.from_pretrained(source, **options)
        return _still(source, model.config, options, images, _packed_tokens(model))
    return transformers.AutoProcessor.from_pretrained(source, **options)


def _still(
    source: str,
    config: Any,
    options: Mapping[str, Any],
    images: Any,
    count: CountTokens,
    *,
    marks_images: bool = False,
) -> StillProcessor:
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
    stored, _ = transformers.ProcessorMixin.get_processor_dict(source, **options)
    return StillProcessor(
        tokenizer=tokenizer,
        image_processor=images,
        image_token_id=config.image_token_id,
        chat_template=default_template(stored.get("chat_template") or tokenizer.chat_template),
        count_tokens=count,
        marks_images=marks_images,
    )


def _grid_tokens(config: Any) -> CountTokens:
    """Patches of the grid (frames, rows, columns), merged in squares."""
    merged = config.vision_config.spatial_merge_size**2
    return lambda pixels: (pixels["image_grid_thw"].prod(dim=-1) // merged).tolist()


def _packed_tokens(model: Any) -> CountTokens:
    """Ask the model's own packing of tiles, on tensors without storage."""
    config, base = model.config, model.model
    tile_vectors = (config.vision_config.image_size // config.vision_config.patch_size) ** 2

    def count(pixels: Mapping[str, Any]) -> list[int]:
        sizes = pixels["image_sizes"]
        tiles = [_num_tiles(size.tolist(), config) for size in sizes]
        vectors = [torch.empty(num, tile_vectors, 1, device="meta") for num in tiles]
        newline = torch.empty(1, device="meta")
        packed, _ = base.pack_image_features(
            vectors, sizes, image_newline=newline, vision_aspect_ratio=config.vision_aspect_ratio
        )
        return [len(picture) for picture in packed]

    return count


def _num_tiles(size: list[int], config: Any) -> int:
    height, width = transformers.image_processing_utils.select_best_resolution(size, config.image_grid_pinpoints)
    edge = config.vision_config.image_size
    tiles: int = 1 + (height // edge) * (width // edge)
    return tiles


def _qwen_vl(source: str, config: Any, options: Mapping[str, Any]) -> StillProcessor:
    """Original Qwen-VL; its generation_config.json tells the chat model from the base model."""
    chat = _json_of(source, "generation_config.json", options).get("chat_format") == "chatml"
    edge = {"height": config.visual["image_size"], "width": config.visual["image_size"]}
    return StillProcessor(
        tokenizer=qwen_tokenizer(_file(source, VOCABULARY_FILE, options), end=TURN_END if chat else END_OF_TEXT),
        image_processor=transformers.CLIPImageProcessorPil(
            size=edge, do_center_crop=False, image_mean=_CLIP_MEAN, image_std=_CLIP_STD
        ),
        image_token_id=config.image_token_id,
        chat_template=QWEN_CHATML if chat else QWEN_RAW,
        count_tokens=lambda pixels: [config.image_tokens] * len(pixels["pixel_values"]),
    )


def _file(source: str, name: str, options: Mapping[str, Any]) -> Path:
    found = cached_file(source, name, revision=options.get("revision"), _raise_exceptions_for_missing_entries=False)
    if found is None:
        raise ModelSupportError(f"{source} has no {name}; copy it from the published checkpoint into the folder")
    return Path(found)


def _json_of(source: str, name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(_file(source, name, options).read_text(encoding="utf-8"))
    return content
