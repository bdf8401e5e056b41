"""Windows of running text as tokens: plain text, no chat template, the tokenizer's own begin token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kvbench.datasets.base import Example
from kvbench.errors import DataError
from kvbench.models.loader import LoadedModel


def window_tokens(loaded: LoadedModel, example: Example) -> tuple[list[int], list[int]]:
    """Return the tokens given and the tokens scored. Raises: DataError if the passage has too few."""
    window = example.window
    assert window is not None
    tokens: list[int] = loaded.tokenizer(example.question)["input_ids"]
    end = window.prompt_tokens + window.scored_tokens
    if len(tokens) < end:
        raise DataError(
            f"{example.id} has {len(tokens)} tokens, and a window takes {end}; raise dataset.chars_per_token "
            f"above {len(example.question) / max(1, len(tokens)):.2f}"
        )
    return tokens[: window.prompt_tokens], tokens[window.prompt_tokens : end]


def window_prompts(loaded: LoadedModel, examples: Sequence[Example]) -> Mapping[str, Tensor]:
    """Return input_ids and attention_mask (B, prompt_tokens); windows of one data set need no pads."""
    rows = torch.tensor([window_tokens(loaded, example)[0] for example in examples])
    return {"input_ids": rows, "attention_mask": torch.ones_like(rows)}
