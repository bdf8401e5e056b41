"""Training batches of scenes: pictures, conversations with labels, and what each cell shows."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerFast

from kvbench.datasets.base import Turn
from kvbench.datasets.scenes import (
    COLOURS,
    GRID_CELLS,
    IMAGE_PIXELS,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    describe,
    describe_prompt,
    draw_scene,
    follow_up_turns,
    object_centres,
    scene_at,
)
from kvbench.models.tiny_llava import PATCH_PIXELS

IGNORED_LABEL = -100
CELL_CLASSES = {"size": SIZES, "texture": TEXTURES, "colour": COLOURS, "shape": SHAPES}


@dataclass(frozen=True, kw_only=True, slots=True)
class SceneBatch:
    """What a training step takes.

    pixels (B, 3, P, P) in -1..1; ids and labels (B, T); cells (B, 16, 4) class or -100; centres
    (B, 144) bool, True at the patch that holds an object's centre.
    """

    pixels: Tensor
    ids: Tensor
    labels: Tensor
    cells: Tensor
    centres: Tensor


class SceneBatches(IterableDataset[SceneBatch]):
    """Batches from train scene `first_index` on, for ever; `tokenizer` None leaves text out."""

    def __init__(
        self, *, tokenizer: PreTrainedTokenizerFast | None, batch_size: int, first_index: int, num_image_tokens: int
    ) -> None:
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.first_index = first_index
        self.num_image_tokens = num_image_tokens

    def __iter__(self) -> Iterator[SceneBatch]:
        torch.set_num_threads(1)
        index = self.first_index
        while True:
            yield self._batch([scene_at("train", index + k) for k in range(self.batch_size)])
            index += self.batch_size

    def _batch(self, scenes: list[Scene]) -> SceneBatch:
        rows = [self._encode(scene) for scene in scenes]
        longest = max(len(ids) for ids, _ in rows)
        pad = self.tokenizer.pad_token_id if self.tokenizer else 0
        return SceneBatch(
            pixels=torch.stack([to_pixels(draw_scene(scene)) for scene in scenes]),
            ids=torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in rows]),
            labels=torch.tensor([labels + [IGNORED_LABEL] * (longest - len(labels)) for _, labels in rows]),
            cells=torch.tensor([_cell_classes(scene) for scene in scenes]),
            centres=torch.stack([_centre_patches(scene) for scene in scenes]),
        )

    def _encode(self, scene: Scene) -> tuple[list[int], list[int]]:
        if self.tokenizer is None:
            return [0], [0]
        return encode_conversation(self.tokenizer, training_turns(scene), self.num_image_tokens)


def training_turns(scene: Scene) -> list[Turn]:
    """Half of the scenes are described first, the others after follow-up questions."""
    rng = random.Random(scene.name + "/turns")
    description = [Turn(question=describe_prompt(scene), answer=describe(scene))]
    if rng.random() < 0.5:
        return description + follow_up_turns(scene, rng.randint(0, 3))
    return follow_up_turns(scene, 5) + description


def encode_conversation(
    tokenizer: PreTrainedTokenizerFast, turns: list[Turn], num_image_tokens: int
) -> tuple[list[int], list[int]]:
    """Return token ids and labels; only answers and their end tokens carry a label."""
    ids, labels = [tokenizer.bos_token_id], [IGNORED_LABEL]
    for number, turn in enumerate(turns):
        picture = "<image>" * num_image_tokens + "\n" if number == 0 else ""
        prompt = tokenizer.encode(f"USER: {picture}{turn.question} ASSISTANT:", add_special_tokens=False)
        answer = [*tokenizer.encode(" " + turn.answer, add_special_tokens=False), tokenizer.eos_token_id]
        ids += prompt + answer
        labels += [IGNORED_LABEL] * len(prompt) + answer
    return ids, labels


def to_pixels(image: Image.Image) -> Tensor:
    """Return what the processor makes of a picture of the right size, (3, P, P) in -1..1."""
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 127.5 - 1.0


def _centre_patches(scene: Scene) -> Tensor:
    side = IMAGE_PIXELS // PATCH_PIXELS
    held = torch.zeros((side, side), dtype=torch.bool)
    for x, y in object_centres(scene):
        held[y // PATCH_PIXELS, x // PATCH_PIXELS] = True
    return held.flatten()


def _cell_classes(scene: Scene) -> list[list[int]]:
    """Per cell the class of each attribute; an empty cell has size class 2 and no other label."""
    empty = [len(SIZES)] + [IGNORED_LABEL] * (len(CELL_CLASSES) - 1)
    cells = [empty] * GRID_CELLS**2
    for item in scene.objects:
        cells[item.row * GRID_CELLS + item.column] = [
            classes.index(getattr(item, name)) for name, classes in CELL_CLASSES.items()
        ]
    return cells
