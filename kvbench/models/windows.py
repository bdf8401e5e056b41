"""Windows of running text as tokens: plain text, no chat template, the tokenizer's own begin token."""

from __future__ import annotations

from kvbench.datasets.base import Example
from kvbench.errors import DataError
from kvbench.models.loader import LoadedModel


def window_tokens(loaded: LoadedModel, example: Example) -> tuple[list[int], list[int]]:
    """Return the tokens given and the tokens scored. Raises: DataError if the passage has too few."""
    window = example.window
    assert window is not None
    tokens = loaded.text.ids(loaded.text.shield(example.question), add_special_tokens=True)
    end = window.prompt_tokens + window.scored_tokens
    if len(tokens) < end:
        raise DataError(
            f"{example.id} has {len(tokens)} tokens, and a window takes {end}; raise dataset.chars_per_token "
            f"above {len(example.question) / max(1, len(tokens)):.2f}"
        )
    return tokens[: window.prompt_tokens], tokens[window.prompt_tokens : end]
