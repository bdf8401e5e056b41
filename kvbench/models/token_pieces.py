"""Each token's own part of a text, so that a text can be shown token by token."""

from __future__ import annotations

from collections.abc import Sequence

from kvbench.models.loader import LoadedModel

_CONTEXT_TOKENS = 4  # enough for the joints of every tokenizer: a space, a character of several bytes


def token_pieces(loaded: LoadedModel, tokens: Sequence[int]) -> list[str]:
    """Return the text of each token in its context; image tokens are empty. Half characters show as U+FFFD."""
    pieces = []
    for index, token in enumerate(tokens):
        before = list(tokens[max(0, index - _CONTEXT_TOKENS) : index])
        pieces.append("" if token == loaded.image_token_id else _last_piece(loaded, before, token))
    return pieces


def _last_piece(loaded: LoadedModel, before: list[int], token: int) -> str:
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    known: str = loaded.tokenizer.decode(before, **options) if before else ""
    both: str = loaded.tokenizer.decode([*before, token], **options)
    piece = both[len(known) :] if both.startswith(known) else str(loaded.tokenizer.decode([token], **options))
    return piece.encode(errors="replace").decode()  # half a surrogate pair is no text
