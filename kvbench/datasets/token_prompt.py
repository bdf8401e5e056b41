"""A prompt without text: how many tokens, how many pictures, drawn from which seed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenPrompt:
    """What a model's vocabulary and picture size turn into a prompt.

    num_tokens counts everything, picture tokens included. num_images 0 or 1, None: 1 where the model
    takes pictures.
    """

    num_tokens: int
    num_images: int | None
    seed: int
