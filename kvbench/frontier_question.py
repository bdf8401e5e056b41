"""What a search is asked for in words: the measure and its task, the margin, the ladder of budgets."""

from __future__ import annotations

import re
from collections.abc import Mapping

from kvbench.errors import ConfigError, close_matches
from kvbench.measures import MEASURES
from kvbench.stats.tests import is_quality, smallest_margin

LADDER = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
_SMALLEST_MARGIN = 1e-6
_TASKS = {
    "ppl": ["task=perplexity"],
    "ppl_released": ["task=perplexity_released"],
    "kl_to_full": ["task=fidelity"],
    "top1_agreement_fraction": ["task=fidelity"],
    "rougeL_released_vs_full": ["task=generation", "task.generation.released_rouge=true"],
}


def task_words(name: str) -> list[str]:
    """Return the settings of the task that measures `name` and nothing more than it must."""
    if re.match(r"turn\d+_", name):
        return ["task=conversation"]
    return _TASKS.get(name, ["task=generation"])


def asked(own: Mapping[str, str]) -> tuple[str, float]:
    """Return measure and margin. Raises: ConfigError."""
    name = own.get("measure", "rougeL_vs_full")
    known = [one for one in MEASURES if is_quality(one)]
    if name not in known:
        raise ConfigError(f"measure is {name!r}; {close_matches(name, known)}")
    margin = _number("margin", own["margin"]) if "margin" in own else smallest_margin(name)
    assert margin is not None
    if not _SMALLEST_MARGIN <= margin < 10:
        allowed = f"at least {_SMALLEST_MARGIN:g} and below 10"
        raise ConfigError(f"margin is {own['margin']}; it must be {allowed}, in the unit of {name}")
    return name, margin


def asked_ladder(text: str | None, *, tokens: bool) -> tuple[float, ...]:
    """Return the rungs, rising. Raises: ConfigError."""
    if text is None and tokens:
        raise ConfigError("budget=tokens has no ladder of its own; add ladder=16,32,64,128")
    rungs = LADDER if text is None else tuple(_number("ladder", word) for word in text.strip("[]").split(","))
    if len(rungs) < 2 or list(rungs) != sorted(set(rungs)):
        raise ConfigError(f"ladder is {text}; it must hold at least two budgets, rising, each once")
    allowed = "whole numbers of tokens" if tokens else "shares above 0, at most 1"
    if not all((rung >= 1 and rung.is_integer()) if tokens else 0 < rung <= 1 for rung in rungs):
        raise ConfigError(f"ladder is {text}; {allowed}")
    return rungs


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ConfigError(f"{name} is {text!r}; it must be a number") from error
