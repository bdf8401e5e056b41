"""Does a data set fit the model and the tasks: told before any model is loaded; and what it left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvbench.datasets.base import Dataset, Example, SkippedItem
from kvbench.errors import ConfigError, DataError
from kvbench.models.modality import takes_images
from kvbench.models.spec import ModelSpec

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
