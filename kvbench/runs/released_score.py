"""The ROUGE-L of Elastic Cache's code on the texts that it compares: special tokens are left in."""

from __future__ import annotations

from collections.abc import Sequence

from kvbench.metrics.rouge_released import rouge_l_released
from kvbench.models.loader import LoadedModel


def released_score(loaded: LoadedModel, answer: Sequence[int], full: Sequence[int], max_new_tokens: int) -> float:
    """Return the score of `answer` against the full cache's; one shorter than `max_new_tokens` had an end token."""
    texts = [_text(loaded, tokens, max_new_tokens) for tokens in (answer, full)]
    return rouge_l_released(prediction=texts[0], reference=texts[1])


def _text(loaded: LoadedModel, tokens: Sequence[int], max_new_tokens: int) -> str:
    ended = [*tokens, loaded.eos_token_id] if len(tokens) < max_new_tokens else list(tokens)
    text: str = loaded.tokenizer.decode(ended)
    return text.strip()
