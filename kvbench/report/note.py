"""What a note is: one thing that a reader must know before believing the tables."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Note:
    """One warning: a sentence or two, and the numbers behind it."""

    text: str
    details: tuple[str, ...] = ()
