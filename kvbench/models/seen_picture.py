"""The picture as a model saw it, and where in it each of its image tokens lies.

What a processor crops or stretches is undone by nothing: the picture is made from the pixels that went
into the vision tower, so a token's patch is where the model looked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from kvbench.cache import Kind
from kvbench.datasets.base import Example
from kvbench.models.inputs import PromptBatch
from kvbench.models.loader import LoadedModel

Place = tuple[int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class SeenPicture:
    """`places`: row and column of each image token in a grid of `rows` x `columns` patches, None where it has none.

    Tokens of enlarged tiles and tokens that a resampler makes from the whole picture have no place.
    """

    image: Image.Image
    rows: int
    columns: int
    places: tuple[Place | None, ...]


def seen_picture(loaded: LoadedModel, example: Example, batch: PromptBatch) -> SeenPicture | None:
    """Return the picture of `example`, whose prompt alone is `batch`; None for text."""
    if example.load_image is None or "pixel_values" not in batch.tensors:
        return None
    num_tokens = int(batch.kind[0].eq(int(Kind.IMAGE)).sum())
    if "image_grid_thw" in batch.tensors:
        return _from_grid(loaded, example.load_image(), batch.tensors["image_grid_thw"][0], num_tokens)
    pixels = batch.tensors["pixel_values"][0]
    first_tile = pixels[0] if pixels.dim() == 4 else pixels
    image = _unnormalised(loaded, first_tile.float().cpu())
    edge = getattr(getattr(loaded.model.config, "vision_config", None), "patch_size", None)
    if edge is None:
        return SeenPicture(image=image, rows=0, columns=0, places=(None,) * num_tokens)
    rows, columns = first_tile.shape[-2] // int(edge), first_tile.shape[-1] // int(edge)
    return SeenPicture(image=image, rows=rows, columns=columns, places=_places(rows, columns, num_tokens))


def _from_grid(loaded: LoadedModel, image: Image.Image, grid: Tensor, num_tokens: int) -> SeenPicture:
    """Patches of the stretched picture, merged in squares; the stretch keeps every place's share of the picture."""
    merged = loaded.model.config.vision_config.spatial_merge_size
    rows, columns = int(grid[1]) // merged, int(grid[2]) // merged
    edge = 14 * merged
    stretched = image.convert("RGB").resize((columns * edge, rows * edge))
    return SeenPicture(image=stretched, rows=rows, columns=columns, places=_places(rows, columns, num_tokens))


def _places(rows: int, columns: int, num_tokens: int) -> tuple[Place | None, ...]:
    """Row by row; one token before the grid is the class token, those after it belong to enlarged tiles."""
    grid: list[Place | None] = [(index // columns, index % columns) for index in range(rows * columns)]
    if num_tokens < len(grid):
        return (None,) * num_tokens
    before = [None] if num_tokens == len(grid) + 1 else []
    return (*before, *grid, *[None] * (num_tokens - len(grid) - len(before)))


def _unnormalised(loaded: LoadedModel, pixels: Tensor) -> Image.Image:
    """(3, H, W) float32 as it went into the vision tower."""
    processor: Any = getattr(loaded.processor, "image_processor", loaded.processor)
    mean, std = (torch.tensor(getattr(processor, name))[:, None, None] for name in ("image_mean", "image_std"))
    levels = ((pixels * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).numpy())
