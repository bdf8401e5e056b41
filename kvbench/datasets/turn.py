"""One question and its right answer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One turn of a conversation; `answer` is empty where no right answer is known."""

    question: str
    answer: str
