"""What a chat template writes between an answer and the next one."""

from __future__ import annotations

from typing import Any

from kvbench.datasets.base import Example
from kvbench.errors import ModelSupportError
from kvbench.models.inputs import written
from kvbench.models.loader import LoadedModel

_MARK = "\ue000answer\ue000"  # private use: no data set writes it


def next_turn_tokens(loaded: LoadedModel, example: Example, number: int) -> list[int]:
    """Return the tokens from the end of answer `number` - 1 to the begin of answer `number` (2 or more).

    They close the answer as the chat template does, ask the follow-up question and open the next
    answer. Raises: ModelSupportError without a chat template, or with one that drops earlier answers.
    """
    if not getattr(loaded.processor, "chat_template", None):
        raise ModelSupportError("the checkpoint has no chat template, so a second turn has no form; leave the task out")
    chat = [_message(loaded, "user", example.context + example.question, with_image=example.load_image is not None)]
    for turn in example.follow_ups[: number - 1]:
        chat += [_message(loaded, "assistant", _MARK), _message(loaded, "user", turn.question)]
    rendered = written(loaded, chat)
    if rendered.count(_MARK) != number - 1:
        raise ModelSupportError("the chat template does not repeat earlier answers as they are; leave the task out")
    tokens: list[int] = loaded.tokenizer(rendered.rpartition(_MARK)[2], add_special_tokens=False)["input_ids"]
    return tokens


def _message(loaded: LoadedModel, role: str, text: str, *, with_image: bool = False) -> dict[str, Any]:
    if not loaded.takes_images:
        return {"role": role, "content": text}
    return {"role": role, "content": [{"type": "image"}] * with_image + [{"type": "text", "text": text}]}
