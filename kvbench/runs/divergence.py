"""Where in two texts the first different token stands, so that a reader sees the very token and not a word near it."""

from __future__ import annotations

from collections.abc import Sequence

from kvbench.metrics.rouge import first_divergence
from kvbench.models.inputs import answer_text
from kvbench.models.loader import LoadedModel

PLACES = ("divergence_starts_at", "divergence_ends_at", "full_divergence_ends_at")


def divergence(loaded: LoadedModel, answer: Sequence[int], full: Sequence[int]) -> dict[str, int | None]:
    """Return first_divergence_tokens, the first token in which the answers differ, and where it stands in the texts.

    divergence_starts_at, in characters, is the same in both; the token ends at divergence_ends_at in the answer and
    at full_divergence_ends_at in the full cache's. In a text that ends there it has no length. Equal answers have
    no place.
    """
    at = first_divergence(answer, full)
    if at is None:
        return {"first_divergence_tokens": None}
    start, end = _place(loaded, answer, at)
    full_start, full_end = _place(loaded, full, at)
    places = (min(start, full_start), end, full_end)
    return {"first_divergence_tokens": at, **dict(zip(PLACES, places, strict=True))}


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
