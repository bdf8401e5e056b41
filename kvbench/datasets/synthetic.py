"""The data set `synthetic`: prompts of random token ids, for models without a tokenizer."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from kvbench.datasets.base import MOST_MADE, Example, TokenPrompt
from kvbench.errors import ConfigError, check_within

SYNTHETIC_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Synthetic:
    """`num_examples` prompts of exactly `prompt_tokens` tokens, picture tokens included.

    num_images: 0 or 1, null for 1 where the model takes pictures. Nothing has an answer, so only tasks
    that look at no text can use it. Raises: ConfigError.
    """

    has_text: ClassVar[bool] = False

    prompt_tokens: int = 1024
    num_images: int | None = None
    num_examples: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        check_within("dataset", self, prompt_tokens=(1, None), num_examples=(1, MOST_MADE), num_images=(0, 1))

    @property
    def fingerprint(self) -> str:
        """The version of the generator; everything else is in the settings."""
        return f"synthetic-v{SYNTHETIC_VERSION}"

    @property
    def label(self) -> str:
        """What tables call it."""
        return f"synthetic, {self.prompt_tokens} tokens"

    def check_image_tokens(self, image_tokens: int) -> None:
        """Raise ConfigError if a picture of `image_tokens` does not fit; 0 is a model that takes text only."""
        if self.num_images and not image_tokens:
            raise ConfigError("dataset.num_images is 1, but the model takes text only; use dataset.num_images=0")
        if self.num_images != 0 and image_tokens and self.prompt_tokens < image_tokens + 2:
            raise ConfigError(
                f"dataset.prompt_tokens is {self.prompt_tokens}, but a picture is {image_tokens} tokens and text "
                f"stands around it; give at least {image_tokens + 2}, or dataset.num_images=0"
            )

    def examples(self) -> Sequence[Example]:
        """Return the prompts, each with a seed of its own."""
        made = []
        for number in range(self.num_examples):
            name, seed = f"synthetic-{self.seed}-{number}", self.seed * 1_000_003 + number
            prompt = TokenPrompt(num_tokens=self.prompt_tokens, num_images=self.num_images, seed=seed)
            made.append(Example(id=name, cluster=name, question="", reference="", token_prompt=prompt))
        return made

    def facts_in(self, text: str) -> frozenset[Hashable]:
        """Return nothing: no text, no facts."""
        return frozenset()
