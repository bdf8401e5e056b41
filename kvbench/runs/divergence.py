"""Where in two texts the first different token stands, so that a reader sees the very token and not a word near it."""

from __future__ import annotations

from collections.abc import Sequence

from kvbench.models.inputs import answer_text
from kvbench.models.loader import LoadedModel


def divergence_places(
    loaded: LoadedModel, answer: Sequence[int], full: Sequence[int], at: int | None
) -> dict[str, int]:
    """Return where token `at`, the first in which the answers differ, stands in their texts, in characters.

    divergence_starts_at is the same in both; it ends at divergence_ends_at in the answer and at
    full_divergence_ends_at in the full cache's. A text that ends there has an empty place. Nothing for equal answers.
    """
    if at is None:
        return {}
    start, end = _place(loaded, answer, at)
    full_start, full_end = _place(loaded, full, at)
    return {
        "divergence_starts_at": min(start, full_start),
        "divergence_ends_at": end,
        "full_divergence_ends_at": full_end,
    }


def _place(loaded: LoadedModel, tokens: Sequence[int], at: int) -> tuple[int, int]:
    """Begin and end of the token in the text without white space around it, as records hold it."""
    text = answer_text(loaded, tokens)
    whole = _decoded(loaded, tokens)
    lead = len(whole) - len(whole.lstrip())
    places = (len(_decoded(loaded, tokens[:count])) - lead for count in (at, at + 1))
    start, end = (max(0, min(len(text), place)) for place in places)
    return start, max(start, end)


def _decoded(loaded: LoadedModel, tokens: Sequence[int]) -> str:
    text: str = loaded.tokenizer.decode(list(tokens), skip_special_tokens=True)
    return text
