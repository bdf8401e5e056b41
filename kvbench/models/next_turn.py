"""What a chat template writes between an answer and the next one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvbench.datasets.base import Example
from kvbench.errors import ModelSupportError
from kvbench.models.chat import ANSWER_MARK, message, render_chat

if TYPE_CHECKING:
    from kvbench.models.loader import LoadedModel


def next_turn_tokens(loaded: LoadedModel, example: Example, number: int) -> list[int]:
    """Return the tokens from the end of answer `number` - 1 to the begin of answer `number` (2 or more).

    They close the answer as the chat template does, ask the follow-up question and open the next
    answer. Raises: ModelSupportError without a chat template, or with one that drops earlier answers.
    """
    shield = loaded.text.shield
    first = shield(example.context + example.question)
    chat = [message(loaded, "user", first, with_image=example.load_image is not None)]
    for turn in example.follow_ups[: number - 1]:
        chat += [message(loaded, "assistant", ANSWER_MARK), message(loaded, "user", shield(turn.question))]
    rendered = render_chat(loaded, chat)
    if rendered.count(ANSWER_MARK) != number - 1:
        raise ModelSupportError("the chat template does not repeat earlier answers as they are; leave the task out")
    return loaded.text.ids(rendered.rpartition(ANSWER_MARK)[2], add_special_tokens=False)
