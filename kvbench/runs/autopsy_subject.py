"""What an autopsy says about a sample whatever the policy: its tokens, its picture, where patches lie."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from kvbench.cache import Kind
from kvbench.datasets.base import Example
from kvbench.models.inputs import prompt_batch
from kvbench.models.loader import LoadedModel
from kvbench.models.seen_picture import SeenPicture, seen_picture
from kvbench.models.token_pieces import token_pieces
from kvbench.results.files import Array, pack
from kvbench.results.record import NEVER

THUMBNAIL_PIXELS = 336
_MOST_BYTES = 16_000
_QUALITIES = (90, 75, 60, 45, 30, 15)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One sample: `pieces` the text of each prompt token, `kinds` (P,) uint8, `picture` as it is stored or None."""

    example: Example
    pieces: list[str]
    kinds: Array
    picture: dict[str, Any] | None

    @property
    def is_image(self) -> Array:
        """(P,) bool."""
        found: Array = self.kinds == int(Kind.IMAGE)
        return found


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
    return {
        "media": media,
        "data": base64.b64encode(data).decode(),
        "width": small.width,
        "height": small.height,
        "rows": picture.rows,
        "columns": picture.columns,
        "places": pack(places),
    }


def thumbnail_file(image: Image.Image) -> tuple[str, bytes]:
    """Return media type and bytes: PNG where that is small, as drawings are, else WebP of falling quality."""
    return next((found for found in _files(image) if len(found[1]) <= _MOST_BYTES), _smallest(image))


def _files(image: Image.Image) -> Iterator[tuple[str, bytes]]:
    yield "image/png", _encoded(image, "PNG", optimize=True)
    for quality in _QUALITIES:
        yield "image/webp", _encoded(image, "WEBP", quality=quality)


def _smallest(image: Image.Image) -> tuple[str, bytes]:
    half = image.resize((max(1, image.width // 2), max(1, image.height // 2)))
    return "image/webp", _encoded(half, "WEBP", quality=_QUALITIES[-1])


def _encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()
