"""Does a data set fit the model and the tasks: told before any model is loaded; and what it left out.

What only the model's own processor can tell is told when it is loaded, before anything is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from kvbench.datasets.base import Dataset, Example, OnBadItem, SkippedItem
from kvbench.errors import ConfigError, DataError
from kvbench.models.inputs import prompt_batch
from kvbench.models.loader import LoadedModel
from kvbench.models.spec import ModelSpec, takes_images

_MOST_NAMES = 100


def check_fit(dataset: Dataset, model: ModelSpec, tasks: Mapping[str, Any], *, query_visible: bool) -> None:
    """Raise DataError or ConfigError, in one line, for a combination that cannot run."""
    examples = dataset.examples()
    _check_ids(examples)
    pictured = next((example for example in examples if example.load_image is not None), None)
    if pictured is not None and takes_images(model) is False:
        raise ConfigError(
            f"the data set has pictures ({pictured.id}), but the model {model.checkpoint} takes text only; "
            "choose another dataset or model"
        )
    for name, task in tasks.items():
        _check_task(examples, name, task)
    if not query_visible:
        _check_hidden(examples, tasks)


def _check_ids(examples: Sequence[Example]) -> None:
    if not examples:
        raise DataError("the data set has no example; nothing would be measured")
    seen: set[str] = set()
    for example in examples:
        if example.id in seen:
            raise DataError(f"the data set has the id {example.id!r} twice; ids must differ")
        seen.add(example.id)


def _check_task(examples: Sequence[Example], name: str, task: Any) -> None:
    if getattr(task, "needs_reference", False):
        bad = next((example for example in examples if not example.reference and example.window is None), None)
        if bad is not None:
            raise DataError(
                f"task.{name} scores reference answers, and {bad.id} has none; give the data set's answers, "
                f"or leave the task out with ~task.{name}"
            )
    if getattr(task, "needs_follow_ups", False):
        bad = next((example for example in examples if not example.follow_ups), None)
        if bad is not None:
            raise DataError(
                f"task.{name} needs a second question, and {bad.id} has none; leave it out with ~task.{name}"
            )


def _check_hidden(examples: Sequence[Example], tasks: Mapping[str, Any]) -> None:
    blind = [name for name, task in tasks.items() if not getattr(task, "hides_question", False)]
    if blind:
        able = "perplexity, generation, fidelity and conversation"
        raise ConfigError(
            f"query_visible=false holds for {able}; leave {', '.join(f'~task.{name}' for name in blind)} out, "
            "or choose task=quality"
        )
    bad = next((example for example in examples if not example.can_hide_question), None)
    if bad is not None:
        raise DataError(
            f"query_visible=false, but {bad.id} has neither a picture nor a context before its question; "
            "set query_visible=true or choose another dataset"
        )


@dataclass(frozen=True, kw_only=True)
class WithoutItems:
    """A data set without the items that a model's processor does not take; they are among its skipped ones.

    Its fingerprint is the whole one's: what was asked for has not changed.
    """

    whole: Dataset
    reasons: Mapping[str, str]
    on_bad_item: ClassVar[OnBadItem] = "skip"

    @property
    def fingerprint(self) -> str:
        """What the whole content depends on."""
        return self.whole.fingerprint

    @property
    def skipped(self) -> Sequence[SkippedItem]:
        """The items that the data set left out itself, then those that the processor does not take, by their id."""
        return [*_skipped(self.whole), *(SkippedItem(item=name, reason=why) for name, why in self.reasons.items())]

    def examples(self) -> Sequence[Example]:
        """Return the others, in the same order."""
        return [example for example in self.whole.examples() if example.id not in self.reasons]

    def facts_in(self, text: str) -> frozenset[Hashable]:
        """Return the facts that `text` states."""
        return self.whole.facts_in(text)


def rejected_items(loaded: LoadedModel, dataset: Dataset, beat: Callable[[], None]) -> dict[str, str]:
    """Return id -> reason of the items whose prompt the model's processor does not take, where they may be skipped.

    beat: called for every item. Raises: DataError if it takes none.
    """
    if getattr(dataset, "on_bad_item", "fail") != "skip":
        return {}
    reasons: dict[str, str] = {}
    examples = dataset.examples()
    for example in examples:
        beat()
        try:
            prompt_batch(loaded, [example])
        except DataError as error:
            reasons[example.id] = str(error)
    if len(reasons) == len(examples):
        raise DataError(f"all {len(examples)} items are bad; the first: {next(iter(reasons.values()))}")
    return reasons


def skipped_measurement(dataset: Dataset) -> dict[str, dict[str, Any]]:
    """Return `num_skipped_items` where the data set may leave bad items out, else nothing."""
    if getattr(dataset, "on_bad_item", "fail") != "skip":
        return {}
    count = len(_skipped(dataset))
    entry = {"value": count, "low": None, "high": None, "n": count + len(dataset.examples()), "unit": "entries"}
    return {"num_skipped_items": {**entry, "method": "counted when the data set was made"}}


def skipped_names(dataset: Dataset) -> list[dict[str, str]]:
    """Return the first 100 items that were left out, each with its reason."""
    return [{"item": found.item, "reason": found.reason} for found in _skipped(dataset)[:_MOST_NAMES]]


def _skipped(dataset: Dataset) -> Sequence[SkippedItem]:
    return getattr(dataset, "skipped", ())
