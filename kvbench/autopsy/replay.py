"""A few prompts decoded once more, one operation after the other, to write down what leaves the cache when.

Two replays: the cell's own policy, and once for all cells the full cache, whose attention while it answers
says what there was to lose. Beside them stands what is the same whatever the policy, the `Subject`: its tokens, each
with its own part of the text, and its picture as the model saw it. What a processor crops or stretches is undone by
nothing: the picture is made from the pixels that went into the vision tower, so a token's patch is where the model
looked.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kvbench.cache import UNLIMITED, Kind
from kvbench.cache.recording import EvictionLog
from kvbench.datasets.base import Example
from kvbench.models.inputs import PromptBatch, prompt_batch
from kvbench.models.loader import LoadedModel
from kvbench.results.files import Array, pack
from kvbench.results.record import NEVER
from kvbench.tasks.decode import CacheSetting, greedy
from kvbench.tasks.foresight import Watching
from kvbench.tasks.task import Part

if TYPE_CHECKING:
    from kvbench.cache import PolicyCache


Place = tuple[int, int]
THUMBNAIL_PIXELS = 336
GLANCE_PIXELS, _MOST_LETTERS = 112, 2000
_MOST_BYTES = 16_000
_QUALITIES = (90, 75, 60, 45, 30, 15)
_HALF = "\ufffd"  # what decoders write for a character whose last bytes are missing


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """One row: its answer, the `steps` tokens of it that went through the cache, and when entries left.

    freed (L, H, N) int64: the decode step that freed an entry, 0 for the prompt's cut, -1 for held. merged
    (L, H, N) int64 or None: the position of the entry that each one joined, -1 for none.
    """

    answer: list[int]
    steps: int
    freed: Array
    merged: Array | None


@torch.inference_mode()
def replay(
    part: Part,
    setting: CacheSetting,
    *,
    end_token_ids: Collection[int],
    max_new_tokens: int,
    choose: Callable[[Tensor], Tensor] | None = None,
) -> list[Replayed]:
    """Return what `setting` does to each row of `part` while it answers greedily, or by `choose`, as `greedy` does.

    Raises: NonFiniteError.
    """
    question = part.batch.question_ids
    longest = max(part.batch.prompt_tokens) + (0 if question is None else question.shape[1])
    log = EvictionLog(num_tokens=longest + max_new_tokens)
    decoding = part.decoding(replace(setting, engine="eager"), max_new_tokens, on_plan=log.note_plan)
    log.after_prompt(decoding.cache)
    steps = [0] * len(part.examples)

    def on_step(cache: PolicyCache, going: list[bool]) -> None:
        log.after_step(cache, going)
        steps[:] = [count + one for count, one in zip(steps, going, strict=True)]

    limits: dict[str, Any] = {"end_token_ids": end_token_ids, "max_new_tokens": max_new_tokens}
    answers = greedy(decoding, **limits, choose=choose, on_step=on_step)
    return [
        Replayed(
            answer=answer,
            steps=steps[row],
            freed=log.freed(row).numpy(),
            merged=None if (into := log.merged_into(row)) is None else into.numpy(),
        )
        for row, answer in enumerate(answers)
    ]


@torch.inference_mode()
def full_attention(part: Part, *, end_token_ids: Collection[int], max_new_tokens: int) -> list[Array]:
    """Return (L, H, N) float32 per row: attention that the full cache gives each token while it answers.

    Summed over the steps of its own greedy answer, mean over the query heads of a KV head. Where nothing was
    decoded, the attention of the prompt's own tokens.
    """
    setting = CacheSetting(policy=Watching(), budget=UNLIMITED, positions="original")
    decoding = part.decoding(setting, max_new_tokens)
    before = masses(decoding.cache)
    latest = [mass.clone() for mass in before]

    def on_step(cache: PolicyCache, going: list[bool]) -> None:
        for known, mass in zip(latest, masses(cache), strict=True):
            rows = torch.tensor(going, device=known.device)
            known[rows] = mass[rows]

    greedy(decoding, end_token_ids=end_token_ids, max_new_tokens=max_new_tokens, on_step=on_step)
    decoded = torch.stack([(after - first).cpu() for first, after in zip(before, latest, strict=True)], dim=1)
    nothing = (decoded.sum(dim=(1, 2, 3)) <= 0)[:, None, None, None]
    found = torch.where(nothing, torch.stack([mass.cpu() for mass in before], dim=1), decoded).float()
    return list(found.numpy())


def masses(cache: PolicyCache) -> list[Tensor]:
    """Return the attention that each token received so far, (B, H, C) per layer, of a cache that evicts nothing.

    Its order of storage is that of tokens.
    """
    found = []
    for layer in cache.policy_layers:
        assert layer.slots is not None
        assert layer.slots.entries.mass is not None
        found.append(layer.slots.entries.mass.masked_fill(layer.slots.entries.position < 0, 0.0).clone())
    return found


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
    tile = (pixels[0] if pixels.dim() == 4 else pixels).float().cpu()  # the first, as it went into the vision tower
    processor: Any = getattr(loaded.processor, "image_processor", loaded.processor)
    mean, std = (torch.tensor(getattr(processor, name))[:, None, None] for name in ("image_mean", "image_std"))
    levels = ((tile * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
    image = Image.fromarray(levels.permute(1, 2, 0).numpy())
    edge = getattr(getattr(loaded.model.config, "vision_config", None), "patch_size", None)
    if edge is None:
        return SeenPicture(image=image, rows=0, columns=0, places=(None,) * num_tokens)
    rows, columns = tile.shape[-2] // int(edge), tile.shape[-1] // int(edge)
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


def token_pieces(loaded: LoadedModel, tokens: Sequence[int]) -> list[str]:
    """Return the text of each token as it stands in the whole; image tokens are empty.

    A character of several tokens is the last one's, those before it are empty.
    """
    pieces: list[str] = []
    context = told = 0  # of tokens[told:] nothing was said yet; tokens[context:told] decide how they join on
    for index, token in enumerate(tokens):
        known = _decoded(loaded, tokens[context:told])
        both = _decoded(loaded, tokens[context : index + 1])
        if both.endswith(_HALF) and index + 1 < len(tokens):
            pieces.append("")
            continue
        piece = both[len(known) :] if both.startswith(known) else _decoded(loaded, tokens[told : index + 1])
        pieces.append("" if token == loaded.image_token_id else piece.encode(errors="replace").decode())
        context, told = told, index + 1
    return pieces


def _decoded(loaded: LoadedModel, tokens: Sequence[int]) -> str:
    text: str = loaded.tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One sample: `pieces` the text of each prompt token, `kinds` (P,) uint8, `picture` as it is stored or None."""

    example: Example
    pieces: list[str]
    kinds: Array
    picture: dict[str, Any] | None


def subject_of(loaded: LoadedModel, example: Example) -> Subject:
    """Return the sample's prompt as it stands in the cache, question included, without pads."""
    batch = prompt_batch(loaded, [example])
    picture = seen_picture(loaded, example, batch)
    return Subject(
        example=example,
        pieces=token_pieces(loaded, batch.tensors["input_ids"][0].tolist()),
        kinds=batch.kind[0].cpu().numpy().astype(np.uint8),
        picture=None if picture is None else _stored(picture),
    )


def _stored(picture: SeenPicture) -> dict[str, Any]:
    """Return thumbnail, grid and places; a place is row and column, NEVER where a token has none."""
    small = picture.image.copy()
    small.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    media, data = thumbnail_file(small)
    places = np.array([place or (NEVER, NEVER) for place in picture.places], dtype=np.uint16).reshape(-1, 2)
    size = {"width": small.width, "height": small.height, "rows": picture.rows, "columns": picture.columns}
    return {"media": media, "data": base64.b64encode(data).decode(), **size, "places": pack(places)}


def glance_of(example: Example, *, with_picture: bool) -> dict[str, Any]:
    """Return what a sample asks, and its picture as small as a reader still recognises it."""
    glance = {"id": example.id, "question": example.question[:_MOST_LETTERS], "media": None, "data": None}
    if example.load_image is None or not with_picture:
        return glance
    small = example.load_image().convert("RGB")
    small.thumbnail((GLANCE_PIXELS, GLANCE_PIXELS))
    media, data = thumbnail_file(small)
    return glance | {"media": media, "data": base64.b64encode(data).decode()}


def thumbnail_file(image: Image.Image) -> tuple[str, bytes]:
    """Return media type and bytes: PNG where that is small, as drawings are, else WebP of falling quality."""
    forms: list[tuple[str, dict[str, Any]]] = [("png", {"optimize": True})]
    for form, options in forms + [("webp", {"quality": quality}) for quality in _QUALITIES]:
        if len(data := _encoded(image, form, **options)) <= _MOST_BYTES:
            return f"image/{form}", data
    half = image.resize((max(1, image.width // 2), max(1, image.height // 2)))
    return "image/webp", _encoded(half, "webp", quality=_QUALITIES[-1])


def _encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()
