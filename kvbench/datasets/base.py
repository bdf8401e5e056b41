"""What a data set gives: examples with a question, perhaps a picture, a reference and known facts."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

from PIL import Image

from kvbench.datasets.token_prompt import TokenPrompt
from kvbench.datasets.turn import Turn


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One item. `cluster` names what items share (a picture, a document), for honest intervals.

    load_image returns the RGB picture when called, None for text only. facts are what a full answer
    states, None where nothing but the reference is known. follow_ups continue the conversation.
    token_prompt stands for question and picture in a data set without text.
    """

    id: str
    cluster: str
    question: str
    reference: str
    load_image: Callable[[], Image.Image] | None = None
    facts: frozenset[Hashable] | None = None
    follow_ups: tuple[Turn, ...] = ()
    token_prompt: TokenPrompt | None = None


class Dataset(Protocol):
    """A data set is cheap to make: it checks its files, and decodes no picture before it is asked.

    One whose prompts are token ids says `has_text = False`; `label`, where it has one, is its name in tables.
    """

    @property
    def fingerprint(self) -> str:
        """What the content depends on, for the key of a cell."""

    def examples(self) -> Sequence[Example]:
        """Return the examples, always in the same order. Raises: DataError naming the item."""

    def facts_in(self, text: str) -> frozenset[Hashable]:
        """Return the facts that `text` states; empty where the data set knows no facts."""
