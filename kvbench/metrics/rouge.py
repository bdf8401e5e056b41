"""Text similarity between two answers, and where two token sequences part.

ROUGE is the F1 of rouge-score 0.1.2 with Porter stemming, on a 0 to 1 scale. Two rules are ours:
texts that are the same up to outer white space score 1.0 (rouge-score gives 0 for two empty texts and,
in rouge2, for two equal words), and a text with letters outside a-z is split by Unicode rules, because
rouge-score drops such letters and scores a Chinese text 0 against itself.

    rouge_scores(prediction="a red square", reference="one red square")["rougeL"]
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

_TYPES = ("rouge1", "rouge2", "rougeL")
# Han, Hiragana and Katakana have no spaces between words, so each character is a token.
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(f"[{_UNSPACED}]|(?:(?![{_UNSPACED}])[^\\W_])+")


def rouge_scores(*, prediction: str, reference: str) -> dict[str, float]:
    """Return rouge1, rouge2 and rougeL as F1 in [0, 1]; an empty text against another scores 0."""
    if prediction.strip() == reference.strip():
        return dict.fromkeys(_TYPES, 1.0)
    scores = _scorer(_needs_unicode(prediction + reference)).score(reference, prediction)
    return {name: float(scores[name].fmeasure) for name in _TYPES}


def _needs_unicode(text: str) -> bool:
    return not text.isascii() and any(letter.isalnum() and not letter.isascii() for letter in text)


@functools.cache
def _scorer(unicode: bool) -> Any:
    # Imported here: it brings nltk, which only a run that scores text should wait for.
    from rouge_score import rouge_scorer, tokenizers

    tokenizer = _UnicodeTokenizer() if unicode else tokenizers.DefaultTokenizer(use_stemmer=True)
    return rouge_scorer.RougeScorer(list(_TYPES), tokenizer=_Remembering(tokenizer))


class _Remembering:
    """Splits a text once: every cell of a sweep is compared with the same references."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenize = functools.lru_cache(maxsize=4096)(tokenizer.tokenize)


class _UnicodeTokenizer:
    """Splits like rouge-score's own tokenizer, but keeps the letters and digits of every script."""

    def __init__(self) -> None:
        from nltk.stem import porter  # type: ignore[import-untyped]

        self._stem: Callable[[str], str] = porter.PorterStemmer().stem

    def tokenize(self, text: str) -> list[str]:
        """Return the lower-case tokens of `text`; ASCII words over three letters are stemmed."""
        words = _WORD.findall(unicodedata.normalize("NFC", text).lower())
        return [self._stem(word) if len(word) > 3 and word.isascii() else word for word in words]


def length_ratio(prediction_tokens: int, full_tokens: int) -> float | None:
    """Return the answer's length over the full cache's; None if only the full cache's is empty."""
    if full_tokens == 0:
        return 1.0 if prediction_tokens == 0 else None
    return prediction_tokens / full_tokens


def first_divergence(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Return the index of the first token that differs, None if the sequences are identical.

    If one is the beginning of the other, the index is the length of the shorter one.
    """
    for index, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return index
    return None if len(a) == len(b) else min(len(a), len(b))
