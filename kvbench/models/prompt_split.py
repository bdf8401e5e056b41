"""Where the question begins in a prompt's tokens, for a policy that must not see it when it compresses.

The picture and the context come first and are compressed alone; the question and whatever the chat
template writes after it follow as a second chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from kvbench.datasets.base import Example
from kvbench.errors import DataError, ModelSupportError
from kvbench.models.inputs import adds_special_tokens, prompt_text
from kvbench.models.loader import LoadedModel

_MARK = "\ue000question\ue000"  # private use: no data set writes it


def num_question_tokens(loaded: LoadedModel, example: Example) -> int:
    """Return how many tokens at the prompt's end are the question and what follows it.

    A token that holds letters of both counts as the question's, so nothing of the question is in the
    first part. Raises: DataError if nothing stands before the question, ModelSupportError if the chat
    template does not write message and picture in order.
    """
    if not example.can_hide_question:
        raise DataError(f"{example.id} has neither a picture nor a context before its question; set query_visible=true")
    whole = prompt_text(loaded, example)
    before, mark, after = prompt_text(loaded, example, before_question=_MARK).partition(_MARK)
    if not mark or before + after != whole:
        raise ModelSupportError(
            "the chat template changes the message, so the question's begin is unknown; set query_visible=true"
        )
    adds = adds_special_tokens(loaded, whole)
    first = loaded.text.ids(before, add_special_tokens=adds)
    tokens = loaded.text.ids(whole, add_special_tokens=adds)
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, tokens, strict=False)))
    if shared == 0 or loaded.image_token_id in tokens[shared:]:
        raise ModelSupportError(
            "the chat template writes the picture after the question, or nothing before it; set query_visible=true"
        )
    return len(tokens) - shared


def by_question_length(loaded: LoadedModel, examples: Sequence[Example]) -> dict[int, list[Example]]:
    """Return the examples by the number of their question's tokens, in order of appearance.

    A second chunk has no pads, so only those of one number can be decoded together.
    """
    groups: dict[int, list[Example]] = {}
    for example in examples:
        groups.setdefault(num_question_tokens(loaded, example), []).append(example)
        loaded.beat()
    return groups
