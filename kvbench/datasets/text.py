"""Plain text: running text in windows (WikiText-2, PG-19, any book), documents to summarise, and random token ids.

Of a window so many tokens are given and the next ones scored. Windows begin at places that follow from the text
alone, every (prompt_tokens + scored_tokens) * chars_per_token characters at the next space, so that every model is
scored on the same places whatever its tokenizer. What a window holds beyond its scored tokens is unused.

Documents (multi_news, XSum, CNN/DailyMail, any table with a document and a summary) come first and the instruction
after them, so that it can be hidden from a policy that compresses the document.

`Synthetic` gives prompts of random token ids, for models without a tokenizer.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import ClassVar

from kvbench.datasets.base import MOST_MADE, Example, TokenPrompt, Window, is_unicode
from kvbench.datasets.files import FileDataset, Row, confined, read_rows, read_text
from kvbench.errors import ConfigError, DataError, check_within

_TEXTS = Path(__file__).parent / "texts"  # source and licence of each lie beside it
_BUNDLED = {"bundled": _TEXTS / "frankenstein.txt", "bundled_lectures": _TEXTS / "lectures.txt"}
_SEARCH_CHARS = 200  # how far a window's begin may move to stand at a space


@dataclass(frozen=True, kw_only=True)
class TextWindows(FileDataset):
    """Windows of a text file, of a table's text column, or of every .txt file in a folder (each a cluster).

    path `bundled` is the novel that comes with kvbench, `bundled_lectures` the lectures, both in the public domain.
    num_samples counts windows. windows_per_file: at most so many of each file, null for all. column, joiner:
    for a table, the field that holds the text, and what stands between rows. Raises as FileDataset, and
    DataError for a file too short for one window.
    """

    prompt_tokens: int = 512
    scored_tokens: int = 256
    windows_per_file: int | None = None
    chars_per_token: float = 6.0
    column: str = "text"
    joiner: str = "\n\n"

    def _check_settings(self) -> None:
        counted = dict.fromkeys(("prompt_tokens", "scored_tokens", "windows_per_file"), (1, None))
        check_within("dataset", self, **counted)
        if not 0.0 < self.chars_per_token <= 100.0:
            raise ConfigError(f"dataset.chars_per_token is {self.chars_per_token}; it must lie in (0, 100]")

    @property
    def _place(self) -> Path:
        return _BUNDLED.get(self.path) or Path(self.path).expanduser()

    def _rows(self) -> Iterator[Row]:
        path = self._place
        if path.is_dir():
            for name in sorted(file.name for file in path.glob("*.txt")):
                try:
                    yield from self._windows(name, _text_of(confined(name, path, name)))
                except DataError as error:
                    yield Row(where=name, number=0, problem=str(error))
        elif path.suffix.lower() == ".txt":
            yield from self._windows(path.name, _text_of(path))
        else:
            yield from self._windows(path.name, self._joined())

    def _windows(self, name: str, text: str) -> Iterator[Row]:
        size = max(1, round((self.prompt_tokens + self.scored_tokens) * self.chars_per_token))
        if len(text) < size:
            raise DataError(
                f"{name} has {len(text)} characters, and a window takes {size}; give a longer text or smaller windows"
            )
        begins = [_next_word(text, start) for start in range(0, len(text) - size + 1, size)]
        for number, (begin, end) in enumerate(islice(pairwise([*begins, len(text)]), self.windows_per_file)):
            passage = text[begin : min(end, begin + size)]
            yield Row(where=f"{name}, window {number}", number=number, content=(name, passage))

    def _joined(self) -> str:
        texts = []
        for row in read_rows(self.path):
            text = row.fields(self.column).content.get(self.column)
            if not isinstance(text, str):
                raise DataError(f"{row.where} has no text {self.column!r}; set dataset.column")
            texts.append(text)
        return self.joiner.join(texts)

    def _example(self, row: Row) -> Example:
        name, passage = row.read()
        if not is_unicode(passage) or not passage.strip():
            raise DataError(f"{row.where} is empty or holds half a surrogate pair; it must be whole Unicode text")
        in_folder = self._place.is_dir()
        return Example(
            id=f"{name}/{row.number}",
            cluster=name if in_folder else f"{name}/{row.number}",
            question=passage,
            reference="",
            window=Window(prompt_tokens=self.prompt_tokens, scored_tokens=self.scored_tokens),
        )


def _text_of(path: Path) -> str:
    return read_text(path, "text", path.name).replace("\r\n", "\n")


def _next_word(text: str, start: int) -> int:
    """Return the begin of the next word, or `start` where none is near (a script without spaces)."""
    if start == 0:
        return 0
    near = text[start - 1 : start + _SEARCH_CHARS]
    space = next((at for at, letter in enumerate(near) if letter.isspace()), None)
    return start if space is None else start + space


@dataclass(frozen=True, kw_only=True)
class Summaries(FileDataset):
    """Examples of a JSON, JSONL, CSV or Parquet file, or of the hub, each document a cluster.

    document, summary: names of the fields. instruction: what stands after the document; empty where the
    document is a whole prompt already. The id is the row's `id`, else its number.
    """

    document: str = "document"
    summary: str = "summary"
    instruction: str = "Summarize the text above in a few sentences."

    def _example(self, row: Row) -> Example:
        fields = row.fields(self.document, self.summary)
        name = fields.id("id", default=row.number)
        document, instruction = fields.text(self.document), self.instruction.strip()
        return Example(
            id=name,
            cluster=name,
            context=f"{document}\n\n" if instruction else "",
            question=instruction or document,
            reference=fields.text(self.summary),
        )


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
