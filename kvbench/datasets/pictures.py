"""Pictures of a data set: inside their folder, of a known format, not giant, whole, and shown as they are meant.

Size and format come from the header before anything is decoded; then the picture is decoded once,
when the data set is made, because a file that breaks off can be told in no other way.

What a model is shown is the picture as a viewer on a white page shows it (`SHOWN_AS`): turned as EXIF says, 16 bits
scaled to 8, what is transparent white. What has no such picture is refused: animations, and a transparent colour of 16
bits, which Pillow does not keep.
"""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from kvbench.datasets.base import is_unicode
from kvbench.errors import ConfigError, DataError, missing_path

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 64 * 10**6
MAX_SIDES = 200  # longer side over shorter one: what Qwen2.5-VL's processor takes (smart_resize), and other models too
SHOWN_AS = "upright, 16 bits scaled to 8, on white"  # part of every fingerprint; a change makes old records old
_DEEP_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N", "F")
_MAX_LEVEL = 65535
_MAX_NAME = 1024


def picture_at(name: Any, folder: Path, where: str) -> partial[Image.Image]:
    """Return the loader of the picture `name` inside `folder`.

    Raises: DataError unless the picture is whole, ConfigError if there is no such folder, whose items are not to blame.
    """
    if not folder.is_dir():
        raise ConfigError(f"dataset.images {folder} cannot be read ({missing_path(folder)}); give a folder")
    path = confined(name, folder, where)
    _, problem = _inspected(path)
    if problem is not None:
        raise DataError(f"{where}: {problem}")
    return partial(load_picture, path, where)


def picture_digest(load: Callable[[], Image.Image] | None) -> str:
    """Return the SHA-256 of the file that `load` reads, and the rule of how it is shown; empty for no picture."""
    return f"{_inspected(load.args[0])[0]}, {SHOWN_AS}" if isinstance(load, partial) else ""


def confined(name: Any, folder: Path, where: str) -> Path:
    """Return the path of `name` if it exists inside `folder`, links followed. Raises: DataError."""
    if not isinstance(name, str) or not is_unicode(name) or "\0" in name or not 0 < len(name) <= _MAX_NAME:
        raise DataError(f"{where} has the image {str(name)[:80]!r}; it must be a path inside {folder}")
    root = folder.resolve()
    try:
        path = (root / name).resolve()
        is_file = path.is_file()
    except (OSError, RuntimeError) as error:  # a name that is too long, links in a circle
        raise DataError(f"{where} names the image {name[:80]!r}, which cannot be opened ({error})") from error
    if not path.is_relative_to(root):
        raise DataError(f"{where} names the image {name!r}, which lies outside {folder}; set dataset.images")
    if not is_file:
        raise DataError(f"{where} names the image {name!r}, which is not a file in {folder}; set dataset.images")
    return path


def load_picture(path: Path, where: str) -> Image.Image:
    """Return the picture as RGB (`as_shown`). Raises: DataError for broken, giant or unknown formats and animations."""
    try:
        with warnings.catch_warnings(), Image.open(path, formats=FORMATS) as image:
            warnings.simplefilter("ignore")  # about damage beside the pixels
            problem = _problem_of_header(image)
            if problem is not None:
                raise DataError(f"{where}: {path.name} {problem}")
            return as_shown(image)
    except (DataError, MemoryError):
        raise
    except Exception as error:  # decoders raise many kinds, SyntaxError and struct.error among them
        raise DataError(f"{where}: {path.name} cannot be decoded ({error}); allowed: {', '.join(FORMATS)}") from error


def _problem_of_header(image: Image.Image) -> str | None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        return f"has {width} x {height} pixels; at most {MAX_PIXELS}"
    if max(width, height) > MAX_SIDES * min(width, height):
        return f"has {width} x {height} pixels; a picture may be at most {MAX_SIDES} times as long as wide"
    if "transparency" in image.info and any("RGB;16" in str(tile) for tile in getattr(image, "tile", ())):
        return "has 16 bits a colour, one of which means transparent, and is read with 8; save it with an alpha channel"
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # the further frames of a photograph are its previews
        return f"has {frames} frames; save the one that is meant as a picture of its own"
    return None


def as_shown(image: Image.Image) -> Image.Image:
    """Return `image` as RGB, as a viewer on a white page shows it.

    Raises: ValueError for levels that are no 16 bits, and whatever a decoder raises.
    """
    image.load()
    with contextlib.suppress(Exception):  # EXIF that cannot be read says nothing, as every viewer takes it
        image = ImageOps.exif_transpose(image)
    if image.mode in _DEEP_MODES:
        image = _eight_bits(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    colours = image.convert("RGBA")
    page = Image.new("RGBA", colours.size, "white")
    return Image.alpha_composite(page, colours).convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Return grey of 0 to 255 for levels of 0 to 65535, a level that means transparent kept so."""
    levels = np.asarray(image, dtype=np.float32)
    if not bool(((levels >= 0) & (levels <= _MAX_LEVEL)).all()):  # not a number fails too
        raise ValueError(f"a picture of mode {image.mode} holds levels from 0 to {_MAX_LEVEL}; it has others")
    grey = Image.fromarray((levels * (255 / _MAX_LEVEL)).round().astype(np.uint8))
    hidden = image.info.get("transparency")
    if hidden is not None:
        grey.putalpha(Image.fromarray(np.where(levels == hidden, 0, 255).astype(np.uint8)))
    return grey


def _inspected(path: Path) -> tuple[str, str | None]:
    """Return the SHA-256 of the file's bytes, and what is wrong with the picture."""
    state = path.stat()
    return _inspected_state(path, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=2**16)  # a sweep makes its data set once per cell, but a picture is decoded once
def _inspected_state(path: Path, size_bytes: int, changed_ns: int) -> tuple[str, str | None]:
    problem = None
    try:
        load_picture(path, "")
    except DataError as error:
        problem = str(error).removeprefix(": ")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest(), problem
