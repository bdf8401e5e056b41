"""Pictures of a data set: inside their folder, of a known format, not giant, and whole.

Size and format come from the header before anything is decoded; then the picture is decoded once,
when the data set is made, because a file that breaks off can be told in no other way.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from PIL import Image

from kvbench.datasets.fields import is_unicode
from kvbench.errors import DataError

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 64 * 10**6
_MAX_NAME = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class _Inspected:
    """What a look at a file gave: the SHA-256 of its bytes, and what is wrong with it."""

    digest: str
    problem: str | None


def picture_at(name: Any, folder: Path, where: str) -> partial[Image.Image]:
    """Return the loader of the picture `name` inside `folder`. Raises: DataError, unless it is whole."""
    path = confined(name, folder, where)
    problem = _inspected(path).problem
    if problem is not None:
        raise DataError(f"{where}: {problem}")
    return partial(load_picture, path, where)


def picture_digest(load: Callable[[], Image.Image] | None) -> str:
    """Return the SHA-256 of the file that `load` reads, empty for no picture."""
    return _inspected(load.args[0]).digest if isinstance(load, partial) else ""


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
    """Return the picture as RGB. Raises: DataError for broken, giant or unknown formats."""
    try:
        with warnings.catch_warnings(), Image.open(path, formats=FORMATS) as image:
            warnings.simplefilter("ignore")  # about transparency, which RGB does not have
            if image.width * image.height > MAX_PIXELS:
                raise DataError(f"{where}: {path.name} has {image.width} x {image.height} pixels; at most {MAX_PIXELS}")
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError: a broken PNG
        raise DataError(f"{where}: {path.name} cannot be decoded ({error}); allowed: {', '.join(FORMATS)}") from error


def _inspected(path: Path) -> _Inspected:
    state = path.stat()
    return _inspected_state(path, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=2**16)  # a sweep makes its data set once per cell, but a picture is decoded once
def _inspected_state(path: Path, size_bytes: int, changed_ns: int) -> _Inspected:
    try:
        load_picture(path, "")
        problem = None
    except DataError as error:
        problem = str(error).removeprefix(": ")
    with path.open("rb") as file:
        return _Inspected(digest=hashlib.file_digest(file, "sha256").hexdigest(), problem=problem)
