"""Texts of a row: there, of the right type, not empty, whole Unicode, and text alone, no mark of a picture."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from kvbench.errors import DataError

# What the prompts of every supported family hold in the place of a picture, and around it. A text that has one
# of them asks for a picture that is not there, whichever model reads it.
PICTURE_MARKS = (
    *("<image>", "<video>"),  # LLaVA, LLaVA-NeXT, LLaVA-OneVision, the bundled model
    *("<|image_pad|>", "<|video_pad|>", "<|vision_pad|>", "<|vision_start|>", "<|vision_end|>"),  # Qwen2.5-VL, Qwen3-VL
    *("<img>", "</img>", "<imgpad>"),  # the original Qwen-VL
)
_MARK = re.compile("|".join(map(re.escape, PICTURE_MARKS)))


def without_marks(text: str) -> str:
    """Return `text` with a space after the first letter of every picture mark, so that it is read as text."""
    return _MARK.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)


def is_unicode(text: str) -> bool:
    """Return whether `text` can be written as UTF-8, which half a surrogate pair can not."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def object_of(content: Any, where: str, needs: Iterable[str]) -> Mapping[str, Any]:
    """Return `content` as a JSON object. Raises: DataError."""
    if not isinstance(content, dict):
        raise DataError(f"{where} is {str(content)[:80]!r}; it must be an object with {', '.join(needs)}")
    return content


def text_of(content: Mapping[str, Any], name: str, where: str) -> str:
    """Return the text `name` without space around it. Raises: DataError unless it is there and not empty."""
    if not isinstance(content.get(name), str):
        found = f"the {name} {str(content[name])[:80]!r}" if name in content else f"no {name}"
        raise DataError(f"{where} has {found}; it needs the text {name!r}, and has the fields {_names(content)}")
    return checked_text(content[name], name, where)


def checked_text(text: str, name: str, where: str) -> str:
    """Return `text` without space around it. Raises: DataError if nothing is left or it is no whole Unicode."""
    if not text.strip():
        raise DataError(f"{where} has an empty {name}; every item needs one")
    if not is_unicode(text):
        raise DataError(f"{where} has half a surrogate pair in its {name}; it must be whole Unicode text")
    return text.strip()


def id_of(content: Mapping[str, Any], names: Iterable[str], default: str, where: str) -> str:
    """Return the first of `names` that the row has, as text; numbers count. Raises: DataError."""
    found = next((content[name] for name in names if content.get(name) is not None), default)
    if isinstance(found, bool) or not isinstance(found, str | int):
        raise DataError(f"{where} has the id {str(found)[:80]!r}; it must be text or a whole number")
    return checked_text(str(found), "id", where)


def _names(content: Mapping[str, Any]) -> str:
    return ", ".join(sorted(map(str, content)))[:200] or "none"
