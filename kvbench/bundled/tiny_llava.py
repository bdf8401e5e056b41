"""The bundled tiny LLaVA: transformers' own classes at a size that a laptop runs at once, and what it is taught.

A CLIP tower (576 patches of a 144-pixel picture, as many as LLaVA-1.5 has), the LLaVA projector and a Llama decoder
with grouped-query attention, with a real processor and chat template, so that the bundled model goes through exactly
the code that LLaVA-1.5-7B goes through.

A training step takes scenes as tensors, drawn on the device, and their conversations. Processes of their own draw up
the scenes as a few integers each; the pictures are made of them where the model is, a batch in a millisecond, pixel for
pixel as `draw_scene` draws them but for the noise, which comes from torch.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from kvbench.datasets.base import Turn
from kvbench.datasets.scenes import (
    BACKGROUNDS,
    CELL_PIXELS,
    COLOURS,
    GRID_CELLS,
    IMAGE_PIXELS,
    NOISE_LEVELS,
    RADII,
    RGB,
    SHAPES,
    Scene,
    describe,
    describe_prompt,
    drawing_of,
    follow_up_turns,
    scene_at,
    sprite,
)

PATCH_PIXELS = 6
HEAD_SIZE = 32
MAX_VOCAB_TOKENS = 640
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<image>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}"
    "{% else %} ASSISTANT: {% for part in message['content'] %}{{ part['text'] }}{% endfor %}{{ eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of at most 640 entries; any text can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCAB_TOKENS,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    pad, bos, eos, image = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        extra_special_tokens={"image_token": image},
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def tiny_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Return the processor that turns pictures and chats into the tiny LLaVA's inputs."""
    from transformers import CLIPImageProcessorPil  # training, on a machine with another release, does without

    edge = {"height": IMAGE_PIXELS, "width": IMAGE_PIXELS}
    images = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_PIXELS}, crop_size=edge, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH_PIXELS,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def tiny_llava(
    tokenizer: PreTrainedTokenizerFast, *, width: int = 192, num_layers: int = 4, num_kv_heads: int = 2
) -> LlavaForConditionalGeneration:
    """Return the untrained model for `tokenizer`, weights from torch's global generator.

    width, num_layers, num_kv_heads are the decoder's, whose heads have size 32; three query heads share a KV head.
    """
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=IMAGE_PIXELS,
        patch_size=PATCH_PIXELS,
        projection_dim=128,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=num_layers,
        num_attention_heads=3 * num_kv_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=HEAD_SIZE,
        max_position_embeddings=2048,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=(IMAGE_PIXELS // PATCH_PIXELS) ** 2,
        tie_word_embeddings=False,
    )
    return LlavaForConditionalGeneration(config)


SIDE_PATCHES = IMAGE_PIXELS // PATCH_PIXELS
NUM_PATCHES = SIDE_PATCHES**2
TEXT_TOKENS = 112
IGNORED_LABEL = -100
COVERED = 0.1  # of a patch, from which on it shows an object
BARE = 0.01  # up to which it shows none
_NUM_CELLS = GRID_CELLS**2
_CELL_PATCHES = CELL_PIXELS // PATCH_PIXELS
# As byte-level BPE splits text before it merges: no token crosses these pieces, so each is encoded once for all.
_PIECE = re.compile(r" ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+")


@dataclass(frozen=True, kw_only=True, slots=True)
class Lesson:
    """A batch, integers alone.

    cells (B, 16, 5): colour or -1 where the cell is empty, shape, radius, and the centre's place from the middle of
    the cell, x and y in pixels; background (B,); ids and labels (B, 112), what follows the picture, padded right;
    talk (B, 112) bool, True at tokens of questions.
    """

    cells: Tensor
    background: Tensor
    ids: Tensor
    labels: Tensor
    talk: Tensor

    def to(self, device: torch.device) -> Lesson:
        """Return the batch on `device`."""
        move = {name: getattr(self, name).to(device, non_blocking=True) for name in self.__slots__}
        return Lesson(**move)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pictures:
    """Pictures of a batch and what their patches show.

    pixels (B, 3, 144, 144) in -1..1; shown (B, 576) bool, patches with a part of an object; bare (B, 576) bool, with
    none; centres (B, 576) bool, the one to four in the middle of an object; cell (576,), the cell of each patch.
    """

    pixels: Tensor
    shown: Tensor
    bare: Tensor
    centres: Tensor
    cell: Tensor


class Words:
    """Token ids of text, piece by piece from memory; equal to the tokenizer's."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.known: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        """Return the ids of `text`, which holds no special token."""
        found: list[int] = []
        for piece in _PIECE.findall(text):
            if piece not in self.known:
                self.known[piece] = self.tokenizer.encode(piece, add_special_tokens=False)
            found += self.known[piece]
        return found

    def before_picture(self) -> list[int]:
        """Return what every conversation begins with."""
        return [self.tokenizer.bos_token_id, *self.ids("USER:"), *self.ids(" ")]

    def after_picture(self, turns: Sequence[Turn], most_tokens: int) -> tuple[list[int], list[int]]:
        """Return ids and labels of as many of `turns` as fit; only answers and their end tokens carry a label."""
        ids: list[int] = []
        labels: list[int] = []
        for number, turn in enumerate(turns):
            prompt = self.ids(f"{'USER: ' if number else chr(10)}{turn.question} ASSISTANT:")
            answer = [*self.ids(" " + turn.answer), self.tokenizer.eos_token_id]
            if len(ids) + len(prompt) + len(answer) > most_tokens:
                break
            ids += prompt + answer
            labels += [IGNORED_LABEL] * len(prompt) + answer
        return ids, labels


def training_turns(scene: Scene) -> list[Turn]:
    """Half of the scenes are described first and then asked about, the others the other way round."""
    description = [Turn(question=describe_prompt(scene), answer=describe(scene))]
    if random.Random(scene.name + "/turns").random() < 0.5:
        return description + follow_up_turns(scene, 2)
    return follow_up_turns(scene, 4) + description


class Lessons(IterableDataset[Lesson]):
    """Batches of train scenes from `first_index` on, for ever; no scene comes twice."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, *, batch_size: int, first_index: int) -> None:
        self.words = Words(tokenizer)
        self.batch_size = batch_size
        self.first_index = first_index

    def loaded(self, num_workers: int) -> Iterator[Lesson]:
        """Yield the batches, drawn up ahead by `num_workers` processes; with 0, here."""
        ahead = 8 if num_workers else None
        return iter(DataLoader(self, batch_size=None, num_workers=num_workers, prefetch_factor=ahead))

    def __iter__(self) -> Iterator[Lesson]:
        torch.set_num_threads(1)
        worker = get_worker_info()
        number, of = (0, 1) if worker is None else (worker.id, worker.num_workers)
        while True:
            first = self.first_index + number * self.batch_size
            yield lesson_of([scene_at("train", first + k) for k in range(self.batch_size)], self.words)
            number += of


def lesson_of(scenes: Sequence[Scene], words: Words) -> Lesson:
    """Return a batch of `scenes` with their training conversations."""
    pad = words.tokenizer.pad_token_id
    cells = np.zeros((len(scenes), _NUM_CELLS, 5), dtype=np.int64)
    cells[:, :, 0] = -1
    ids = np.full((len(scenes), TEXT_TOKENS), pad, dtype=np.int64)
    labels = np.full((len(scenes), TEXT_TOKENS), IGNORED_LABEL, dtype=np.int64)
    background = np.zeros(len(scenes), dtype=np.int64)
    half = CELL_PIXELS // 2
    for row, scene in enumerate(scenes):
        drawing = drawing_of(scene)
        background[row] = drawing.background
        for item, radius, (x, y) in zip(scene.objects, drawing.radii, drawing.centres, strict=True):
            looks = (COLOURS.index(item.colour), SHAPES.index(item.shape), RADII.index(radius))
            place = (x % CELL_PIXELS - half, y % CELL_PIXELS - half)
            cells[row, item.row * GRID_CELLS + item.column] = (*looks, *place)
        said, wanted = words.after_picture(training_turns(scene), TEXT_TOKENS)
        ids[row, : len(said)] = said
        labels[row, : len(wanted)] = wanted
    return Lesson(
        cells=torch.from_numpy(cells),
        background=torch.from_numpy(background),
        ids=torch.from_numpy(ids),
        labels=torch.from_numpy(labels),
        talk=torch.from_numpy((labels == IGNORED_LABEL) & (ids != pad)),
    )


class Painter(nn.Module):
    """Draws the pictures of a batch on the device that it is moved to."""

    sprites: Tensor
    rgb: Tensor
    grounds: Tensor
    cell: Tensor

    def __init__(self) -> None:
        super().__init__()
        sprites = np.stack([[sprite(shape, radius) for radius in RADII] for shape in SHAPES])
        self.register_buffer("sprites", torch.from_numpy(sprites).long())
        self.register_buffer("rgb", torch.tensor([RGB[colour] for colour in COLOURS]))
        self.register_buffer("grounds", torch.tensor(BACKGROUNDS))
        line = torch.arange(SIDE_PATCHES) // _CELL_PATCHES
        self.register_buffer("cell", (line[:, None] * GRID_CELLS + line[None, :]).flatten())

    @torch.no_grad()
    def forward(self, cells: Tensor, background: Tensor, *, noise: bool = True) -> Pictures:
        """Return the pictures of `cells` (B, 16, 5) and `background` (B,)."""
        held = cells[:, :, 0] >= 0
        colour, shape, radius = cells[:, :, :3].clamp(min=0).unbind(-1)
        line = torch.arange(CELL_PIXELS, device=cells.device)
        x = (line - cells[:, :, 3, None]) % CELL_PIXELS
        y = (line - cells[:, :, 4, None]) % CELL_PIXELS
        cover = self.sprites[shape[..., None, None], radius[..., None, None], y[..., :, None], x[..., None, :]]
        cover = cover * held[..., None, None]  # (B, 16, 36, 36), 0 to 255
        ground = self.grounds[background][:, None, None, None]
        above = (self.rgb[colour][:, :, None, None] - ground) * cover[..., None]
        picture = _of_cells(ground + above.div(255, rounding_mode="floor"))
        if noise:
            picture = picture + torch.randint_like(picture, NOISE_LEVELS) - NOISE_LEVELS // 2
        pixels = picture.clamp(0, 255).permute(0, 3, 1, 2).float() / 127.5 - 1.0
        share = nn.functional.avg_pool2d(_of_cells(cover[..., None])[..., 0].float() / 255, PATCH_PIXELS).flatten(1)
        return Pictures(
            pixels=pixels, shown=share > COVERED, bare=share < BARE, centres=self._centres(cells, held), cell=self.cell
        )

    def _centres(self, cells: Tensor, held: Tensor) -> Tensor:
        """Patches whose own centre lies less than a patch from an object's, across and down."""
        middle = torch.arange(_CELL_PATCHES, device=cells.device) * PATCH_PIXELS + PATCH_PIXELS // 2 - CELL_PIXELS // 2
        across = (middle - cells[:, :, 3, None]).abs() < PATCH_PIXELS
        down = (middle - cells[:, :, 4, None]).abs() < PATCH_PIXELS
        near = down[..., :, None] & across[..., None, :] & held[..., None, None]
        return _of_cells(near[..., None])[..., 0].flatten(1)


def _of_cells(cells: Tensor) -> Tensor:
    """(B, 16, S, S, C) cells in reading order -> (B, 4 S, 4 S, C)."""
    batch, _, side, _, width = cells.shape
    grid = cells.view(batch, GRID_CELLS, GRID_CELLS, side, side, width).transpose(2, 3)
    return grid.reshape(batch, GRID_CELLS * side, GRID_CELLS * side, width)


def by_cell(patches: Tensor) -> Tensor:
    """(..., 576) patches in reading order -> (..., 16, 36), those of each cell together."""
    lead = patches.shape[:-1]
    grid = patches.reshape(*lead, GRID_CELLS, _CELL_PATCHES, GRID_CELLS, _CELL_PATCHES).transpose(-3, -2)
    return grid.reshape(*lead, _NUM_CELLS, _CELL_PATCHES**2)


def of_cell(patches: Tensor) -> Tensor:
    """Undo `by_cell`."""
    lead = patches.shape[:-2]
    grid = patches.reshape(*lead, GRID_CELLS, GRID_CELLS, _CELL_PATCHES, _CELL_PATCHES).transpose(-3, -2)
    return grid.reshape(*lead, NUM_PATCHES)
