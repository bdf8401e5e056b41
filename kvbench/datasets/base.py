"""What a data set gives: examples with a question, perhaps a picture, a reference and known facts.

What data says is checked here as well: a text is there, of the right type, not empty, whole Unicode, and text
alone, no mark of a picture.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from PIL import Image

from kvbench.errors import DataError

OnBadItem = Literal["fail", "skip"]


MOST_MADE = 100_000  # items of a data set that is made, not read: all are looked at before a model is loaded


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One turn of a conversation; `answer` is empty where no right answer is known."""

    question: str
    answer: str


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenPrompt:
    """What a model's vocabulary and picture size turn into a prompt without text.

    num_tokens counts everything, picture tokens included. num_images 0 or 1, None: 1 where the model
    takes pictures.
    """

    num_tokens: int
    num_images: int | None
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """A stretch of running text: `prompt_tokens` are given, the next `scored_tokens` are the answer.

    Both count the model's own tokens, a begin token included; what the passage holds beyond is unused.
    """

    prompt_tokens: int
    scored_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One item. `cluster` names what items share (a picture, a document), for honest intervals.

    The user's message is the picture, then `context`, then `question`, joined as they are. With a
    `window` the question is a passage of text and no message: no chat template, no end token. With
    `completes` context and question are the begin of a text that goes on with the reference: none either.
    load_image returns the RGB picture when called, None for text only. reference is empty where no
    right answer is known. facts are what a full answer states, None where nothing but the reference
    is known, and `fact_noun` is what they are called in measurements. With `one_answer` nothing but
    the reference, which is short, is right; or is_right says of a text whether it is. follow_ups continue
    the conversation. token_prompt stands for question and picture in a data set without text.
    """

    id: str
    cluster: str
    question: str
    reference: str
    context: str = ""
    load_image: Callable[[], Image.Image] | None = None
    facts: frozenset[Hashable] | None = None
    fact_noun: Literal["objects", "needles"] = "objects"
    one_answer: bool = False
    is_right: Callable[[str], bool] | None = None
    follow_ups: tuple[Turn, ...] = ()
    window: Window | None = None
    completes: bool = False
    token_prompt: TokenPrompt | None = None

    @property
    def can_hide_question(self) -> bool:
        """Whether something stands before the question that a policy can compress without it."""
        return self.load_image is not None or bool(self.context)

    @property
    def has_question(self) -> bool:
        """Whether it is known where the question stands: in no running text, and in no drawn tokens."""
        return self.window is None and self.token_prompt is None and bool(self.question)


@dataclass(frozen=True, kw_only=True, slots=True)
class SkippedItem:
    """An item that was left out under `on_bad_item: skip`, where it stands and why."""

    item: str
    reason: str


class Dataset(Protocol):
    """A data set is cheap to make: it checks its files then, before any model is loaded.

    One that can leave items out also has `on_bad_item` and `skipped`, a sequence of `SkippedItem`. One whose
    prompts are token ids says `has_text = False`; `label`, where it has one, is its name in tables.
    """

    @property
    def fingerprint(self) -> str:
        """What the content depends on, for the key of a cell."""

    def examples(self) -> Sequence[Example]:
        """Return the examples, always in the same order. Raises: DataError naming the item."""

    def facts_in(self, text: str) -> frozenset[Hashable]:
        """Return the facts that `text` states; empty where the data set knows no facts."""


# What the prompts of every supported family hold in the place of a picture, and around it. A text that has one
# of them asks for a picture that is not there, whichever model reads it.
PICTURE_MARKS = (
    *("<image>", "<video>"),  # LLaVA, LLaVA-NeXT, LLaVA-OneVision, the bundled model
    *("<|image_pad|>", "<|video_pad|>", "<|vision_pad|>", "<|vision_start|>", "<|vision_end|>"),  # Qwen2.5-VL, Qwen3-VL
    *("<img>", "</img>", "<imgpad>"),  # the original Qwen-VL
)
_MARK = re.compile("|".join(map(re.escape, PICTURE_MARKS)))


def without_marks(text: str) -> str:
    """Return `text` with a space after the first letter of every picture mark, so that it is read as text."""
    return _MARK.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)


def is_unicode(text: str) -> bool:
    """Return whether `text` can be written as UTF-8, which half a surrogate pair can not."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def checked_text(text: str, name: str, where: str) -> str:
    """Return `text` without space around it. Raises: DataError if nothing is left or it is no whole Unicode."""
    if not text.strip():
        raise DataError(f"{where} has an empty {name}; every item needs one")
    if not is_unicode(text):
        raise DataError(f"{where} has half a surrogate pair in its {name}; it must be whole Unicode text")
    return text.strip()


class Fields:
    """The fields of one item; `where` it stands begins every message. Raises: DataError, here and on reading."""

    def __init__(self, content: Any, where: str, needs: Iterable[str]) -> None:
        if not isinstance(content, dict):
            raise DataError(f"{where} is {str(content)[:80]!r}; it must be an object with {', '.join(needs)}")
        self.content: Mapping[str, Any] = content
        self.where = where

    def text(self, name: str) -> str:
        """Return the text `name` without space around it, which must be there and not empty."""
        found = self.content.get(name)
        if not isinstance(found, str):
            seen = f"the {name} {str(found)[:80]!r}" if name in self.content else f"no {name}"
            fields = ", ".join(sorted(map(str, self.content)))[:200] or "none"
            raise DataError(f"{self.where} has {seen}; it needs the text {name!r}, and has the fields {fields}")
        return checked_text(found, name, self.where)

    def id(self, *names: str, default: int | str) -> str:
        """Return the first of `names` that the item has, as text; numbers count."""
        found = next((self.content[name] for name in names if self.content.get(name) is not None), default)
        if isinstance(found, bool) or not isinstance(found, str | int):
            raise DataError(f"{self.where} has the id {str(found)[:80]!r}; it must be text or a whole number")
        return checked_text(str(found), "id", self.where)
