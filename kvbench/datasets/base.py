"""What a data set gives: examples with a question, perhaps a picture, a reference and known facts."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from PIL import Image

from kvbench.datasets.token_prompt import TokenPrompt
from kvbench.datasets.turn import Turn

OnBadItem = Literal["fail", "skip"]


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
    `window` the question is a passage of text and no message: no chat template, no end token.
    load_image returns the RGB picture when called, None for text only. reference is empty where no
    right answer is known. facts are what a full answer states, None where nothing but the reference
    is known, and `fact_noun` is what they are called in measurements. follow_ups continue the
    conversation. token_prompt stands for question and picture in a data set without text.
    """

    id: str
    cluster: str
    question: str
    reference: str
    context: str = ""
    load_image: Callable[[], Image.Image] | None = None
    facts: frozenset[Hashable] | None = None
    fact_noun: Literal["objects", "needles"] = "objects"
    follow_ups: tuple[Turn, ...] = ()
    window: Window | None = None
    token_prompt: TokenPrompt | None = None

    @property
    def can_hide_question(self) -> bool:
        """Whether something stands before the question that a policy can compress without it."""
        return self.load_image is not None or bool(self.context)


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
