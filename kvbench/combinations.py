"""Settings that are right alone and wrong together, told before a model is loaded."""

from __future__ import annotations

from collections.abc import Mapping

from kvbench.cache import Budget, Policy
from kvbench.datasets.base import Dataset
from kvbench.datasets.synthetic import Synthetic
from kvbench.errors import ConfigError
from kvbench.models.spec import ModelSpec, image_tokens
from kvbench.tasks.task import Task


def check_budget_fits(policy: Policy, budget: Budget) -> None:
    """Raise ConfigError for an absolute budget that cannot hold what the policy protects."""
    need = policy.smallest_budget_tokens
    if policy.bounded and budget.tokens is not None and budget.tokens < need:
        raise ConfigError(
            f"budget.tokens is {budget.tokens}, but {type(policy).__name__} protects {need} tokens (sinks and recent "
            f"window); give at least {need}, or fewer sinks"
        )


def check_text(model: ModelSpec, dataset: Dataset, tasks: Mapping[str, Task]) -> None:
    """Raise ConfigError where a task needs text and there is none, or a picture does not fit the prompt."""
    has_text = getattr(dataset, "has_text", True)
    if model.is_random and has_text:
        raise ConfigError(
            "model.weights is 'random', so there is no tokenizer, but the data set has text; use dataset=synthetic "
            "(weights=random chooses it)"
        )
    readers = [name for name, task in tasks.items() if getattr(task, "reads_text", True)]
    if readers and not has_text:
        why = "random weights say nothing" if model.is_random else "prompts of random tokens have no answers"
        raise ConfigError(f"task {', '.join(readers)} scores text, but {why}; use task=speed or task=memory")
    if isinstance(dataset, Synthetic) and (config := model.known_config()) is not None:
        dataset.check_image_tokens(image_tokens(config))
