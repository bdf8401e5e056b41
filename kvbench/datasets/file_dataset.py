"""What every data set read from files shares: checked when made, bad items refused or left out and counted."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import get_args

from kvbench.datasets.base import Example, OnBadItem, SkippedItem
from kvbench.datasets.fields import without_marks
from kvbench.datasets.pictures import picture_digest
from kvbench.datasets.rows import Row, read_rows
from kvbench.datasets.turn import Turn
from kvbench.errors import ConfigError, DataError, close_matches


@dataclass(frozen=True, kw_only=True)
class FileDataset(ABC):
    """Examples of a file. Everything is checked when the data set is made, before any model is loaded.

    num_samples: how many items from the first on, None for all; one that is skipped counts.
    on_bad_item: `fail` stops at the first bad item, `skip` leaves it out and names it in `skipped`.
    Raises: ConfigError for a file that cannot be read or a wrong setting, DataError naming file and item.
    """

    path: str
    num_samples: int | None = None
    on_bad_item: OnBadItem = "fail"

    def __post_init__(self) -> None:
        if self.num_samples is not None and self.num_samples < 1:
            raise ConfigError(f"dataset.num_samples is {self.num_samples}; give at least 1, or null for all")
        if self.on_bad_item not in get_args(OnBadItem):
            raise ConfigError(
                f"dataset.on_bad_item is {self.on_bad_item!r}; {close_matches(self.on_bad_item, get_args(OnBadItem))}"
            )
        self._check_settings()
        examples, skipped = self._checked
        if not examples:
            raise DataError(_nothing_left(self.path, skipped))

    def _check_settings(self) -> None:  # noqa: B027 - most data sets have no more settings
        """Raise ConfigError for a setting of the subclass that is wrong."""

    def _rows(self) -> Iterable[Row]:
        """Yield the items as they stand in the file."""
        return read_rows(self.path)

    @abstractmethod
    def _example(self, row: Row) -> Example:
        """Return the example of a row. Raises: DataError that begins with where the row stands."""

    @cached_property
    def _checked(self) -> tuple[list[Example], list[SkippedItem]]:
        kept: dict[str, Example] = {}
        skipped: list[SkippedItem] = []
        for row in islice(self._rows(), self.num_samples):
            try:
                example = self._new_example(row, kept)
                kept[example.id] = example
            except DataError as error:
                if self.on_bad_item == "fail":
                    raise DataError(f"{error} (dataset.on_bad_item=skip leaves such items out)") from error
                skipped.append(SkippedItem(item=row.where, reason=str(error)))
        return list(kept.values()), skipped

    def _new_example(self, row: Row, kept: dict[str, Example]) -> Example:
        if row.problem is not None:
            raise DataError(row.problem)
        example = _as_text(self._example(row))
        if example.id in kept:
            raise DataError(f"{row.where} has the id {example.id!r}, which an earlier item has; ids must differ")
        return example

    @property
    def skipped(self) -> Sequence[SkippedItem]:
        """The items that were left out, in the file's order."""
        return self._checked[1]

    @cached_property
    def fingerprint(self) -> str:
        """The SHA-256 of everything asked and expected, pictures included; where the files lie does not count."""
        digest = hashlib.sha256()
        for example in self.examples():
            texts = [example.id, example.cluster, example.context, example.question, example.reference]
            turns = [[turn.question, turn.answer] for turn in example.follow_ups]
            facts = sorted(map(repr, example.facts or ()))
            digest.update(json.dumps([texts, turns, facts, picture_digest(example.load_image)]).encode())
        return digest.hexdigest()

    def examples(self) -> Sequence[Example]:
        """Return the examples in the file's order."""
        return self._checked[0]

    def facts_in(self, text: str) -> frozenset[Hashable]:
        """Return nothing: most formats state no facts."""
        return frozenset()


def _as_text(example: Example) -> Example:
    """Return the example with the picture marks in its texts escaped, whichever reader made it."""
    turns = (
        Turn(question=without_marks(turn.question), answer=without_marks(turn.answer)) for turn in example.follow_ups
    )
    facts = example.facts
    if facts is not None:
        facts = frozenset(without_marks(fact) if isinstance(fact, str) else fact for fact in facts)
    return replace(
        example,
        context=without_marks(example.context),
        question=without_marks(example.question),
        reference=without_marks(example.reference),
        follow_ups=tuple(turns),
        facts=facts,
    )


def _nothing_left(path: str, skipped: Sequence[SkippedItem]) -> str:
    if skipped:
        return f"{path}: all {len(skipped)} items are bad; the first: {skipped[0].reason}"
    return f"{path} holds no item"
