"""The order of names in which a reader counts: "32 samples" before "256 samples", item 2 before item 10."""

from __future__ import annotations

import re

_DIGITS = re.compile(r"([0-9]+)")


def natural_key(text: str) -> tuple[object, ...]:
    """Return what to sort by: runs of digits count as numbers of any length; different texts have different keys."""
    parts = _DIGITS.split(text)
    numbers = ((len(digits), digits) for digits in (part.lstrip("0") for part in parts[1::2]))
    return (*(one for pair in zip(parts[::2], (*numbers, ()), strict=True) for one in pair), text)
