"""The ROUGE-L of Elastic Cache's code on the texts that it compares: special tokens are left in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvbench.datasets.base import Example
from kvbench.metrics.rouge_released import rouge_l_released
from kvbench.models.loader import LoadedModel


def add_released_scores(
    rows: Mapping[str, dict[str, Any]],
    loaded: LoadedModel,
    examples: Sequence[Example],
    answers: Sequence[list[int]],
    full: Mapping[str, list[int]],
    max_new_tokens: int,
) -> None:
    """Add rougeL_released_vs_full to the row of each example; an answer below `max_new_tokens` had an end token."""
    for example, answer in zip(examples, answers, strict=True):
        texts = [_text(loaded, tokens, max_new_tokens) for tokens in (answer, full[example.id])]
        rows[example.id]["rougeL_released_vs_full"] = rouge_l_released(prediction=texts[0], reference=texts[1])


def _text(loaded: LoadedModel, tokens: Sequence[int], max_new_tokens: int) -> str:
    ended = [*tokens, loaded.eos_token_id] if len(tokens) < max_new_tokens else list(tokens)
    text: str = loaded.tokenizer.decode(ended)
    return text.strip()
