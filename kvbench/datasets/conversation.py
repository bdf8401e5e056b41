"""The conversation format of the Elastic Cache release: `[{"image": ..., "question": ..., "answer": ...}]`.

Everything is checked when the data set is made, before any model is loaded; only decoding a picture
waits. Image paths are confined to one folder: nothing absolute, no way up, no link that leaves it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from PIL import Image

from kvbench.datasets.base import Example
from kvbench.errors import ConfigError, DataError

_FIELDS = ("question", "answer")
_FORMATS = ("PNG", "JPEG", "WEBP")
_MAX_PIXELS = 64 * 10**6


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Examples of a JSON file. `images`: folder of the pictures, by default the file's own.

    num_samples: how many items from the first on, None for all. Raises: ConfigError for a file that
    cannot be read, DataError naming the item that is wrong.
    """

    path: str
    images: str | None = None
    num_samples: int | None = None

    def __post_init__(self) -> None:
        if self.num_samples is not None and self.num_samples < 1:
            raise ConfigError(f"dataset.num_samples is {self.num_samples}; give at least 1, or null for all")
        if not self._items:
            raise DataError(f"{self.path} holds no item; it must be a list of {{image, question, answer}}")

    @cached_property
    def _items(self) -> list[Example]:
        path = Path(self.path).expanduser()
        folder = Path(self.images).expanduser() if self.images else path.parent
        items = _read_list(path)
        return [_example(item, number, folder) for number, item in enumerate(items[: self.num_samples])]

    @cached_property
    def fingerprint(self) -> str:
        """The SHA-256 of the file and of every picture that it names."""
        digest = hashlib.sha256(Path(self.path).expanduser().read_bytes())
        for picture in self._pictures:
            digest.update(hashlib.sha256(picture.read_bytes()).digest())
        return digest.hexdigest()

    @property
    def _pictures(self) -> list[Path]:
        return [item.load_image.args[0] for item in self._items if isinstance(item.load_image, partial)]

    def examples(self) -> Sequence[Example]:
        """Return the examples in the file's order."""
        return self._items

    def facts_in(self, text: str) -> frozenset[Hashable]:
        """Return nothing: this format states no facts."""
        return frozenset()


def _read_list(path: Path) -> list[Any]:
    try:
        items = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"dataset.path {path} cannot be read ({error.strerror}); give a JSON file") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON in UTF-8 ({error}); it must be a list of items") from error
    if not isinstance(items, list):
        raise DataError(f"{path} holds a {type(items).__name__}; it must be a list of {{image, question, answer}}")
    return items


def _example(item: Any, number: int, folder: Path) -> Example:
    where = f"item {number}"
    if not isinstance(item, dict) or any(not isinstance(item.get(name), str) for name in _FIELDS):
        raise DataError(f"{where} is {str(item)[:80]!r}; it needs the texts {_FIELDS} and may have an image path")
    texts = {name: item[name].replace("<image>", "").strip() for name in _FIELDS}
    for name, text in texts.items():
        if not text:
            raise DataError(f"{where} has an empty {name}; every item needs a question and an answer")
        if not _is_unicode(text):
            raise DataError(f"{where} has half a surrogate pair in its {name}; it must be whole Unicode text")
    picture = item.get("image")
    load = partial(load_picture, confined(picture, folder, where), where) if picture else None
    return Example(
        id=f"{number}",
        cluster=str(picture) if picture else f"{number}",
        question=texts["question"],
        reference=texts["answer"],
        load_image=load,
    )


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def confined(picture: Any, folder: Path, where: str) -> Path:
    """Return the picture's path if it exists inside `folder`, links followed. Raises: DataError."""
    if not isinstance(picture, str) or not _is_unicode(picture) or "\0" in picture or len(picture) > 1024:
        raise DataError(f"{where} has the image {str(picture)[:80]!r}; it must be a path inside {folder}")
    root = folder.resolve()
    try:
        path = (root / picture).resolve()
        is_file = path.is_file()
    except (OSError, RuntimeError) as error:  # a name that is too long, links in a circle
        raise DataError(f"{where} names the image {picture[:80]!r}, which cannot be opened ({error})") from error
    if not path.is_relative_to(root):
        raise DataError(f"{where} names the image {picture!r}, which lies outside {folder}; set dataset.images")
    if not is_file:
        raise DataError(f"{where} names the image {picture!r}, which is not a file in {folder}; set dataset.images")
    return path


def load_picture(path: Path, where: str) -> Image.Image:
    """Return the picture as RGB. Raises: DataError for broken, giant or unknown formats."""
    try:
        with Image.open(path, formats=_FORMATS) as image:
            if image.width * image.height > _MAX_PIXELS:
                raise DataError(
                    f"{where}: {path.name} has {image.width} x {image.height} pixels; at most {_MAX_PIXELS}"
                )
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError: a broken PNG
        raise DataError(f"{where}: {path.name} cannot be decoded ({error}); allowed: {', '.join(_FORMATS)}") from error
