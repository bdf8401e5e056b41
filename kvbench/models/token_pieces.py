"""Each token's own part of a text, so that a text can be shown token by token."""

from __future__ import annotations

from collections.abc import Sequence

from kvbench.models.loader import LoadedModel

_HALF = "\ufffd"  # what decoders write for a character whose last bytes are missing


def token_pieces(loaded: LoadedModel, tokens: Sequence[int]) -> list[str]:
    """Return the text of each token as it stands in the whole; image tokens are empty.

    A character of several tokens is the last one's, those before it are empty.
    """
    pieces: list[str] = []
    context = told = 0  # of tokens[told:] nothing was said yet; tokens[context:told] decide how they join on
    for index, token in enumerate(tokens):
        known = _decoded(loaded, tokens[context:told])
        both = _decoded(loaded, tokens[context : index + 1])
        if both.endswith(_HALF) and index + 1 < len(tokens):
            pieces.append("")
            continue
        piece = both[len(known) :] if both.startswith(known) else _decoded(loaded, tokens[told : index + 1])
        pieces.append("" if token == loaded.image_token_id else piece.encode(errors="replace").decode())
        context, told = told, index + 1
    return pieces


def _decoded(loaded: LoadedModel, tokens: Sequence[int]) -> str:
    text: str = loaded.tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text
