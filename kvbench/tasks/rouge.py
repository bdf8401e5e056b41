"""Text similarity between two answers, where two token sequences part, and how many known facts an answer states.

ROUGE is the F1 of rouge-score 0.1.2 with Porter stemming, on a 0 to 1 scale. Three rules are ours: texts that are the
same up to outer white space score 1.0 (rouge-score gives 0 for two empty texts and, in rouge2, for two equal words); a
text with letters or marks outside ASCII is split by Unicode rules, because rouge-score drops them and scores a Chinese
text 0 against itself; and two texts without any word, such as "?!" or emoji alone, are compared sign by sign. A
combining mark belongs to the letter before it, so that words that differ in a vowel sign are different words.

    rouge_scores(prediction="a red square", reference="one red square")["rougeL"]

`rouge_l_released` is another number, ROUGE-L as Elastic Cache's code reports it. That code takes `rouge-l` of the
package rouge 1.0.1: texts are cut at every full stop, words are counted once however often they occur, and what counts
is the union, over all pairs of sentences, of the words of one longest common subsequence each. Word order between
sentences is lost and repetition costs nothing, so scores are higher than the F1 of one longest common subsequence.

    rouge_l_released(prediction="a cat. a cat. a cat.", reference="a cat.")  # 1.0, where rougeL is 0.5
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

_TYPES = ("rouge1", "rouge2", "rougeL")
_OF_PIECES = _TYPES[:2]
# No spaces between words, so each character is a token: Han, Hiragana and Katakana, whose marks are one with it
# once composed ...
_IDEOGRAPH = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
# ... and Thai, Lao, Myanmar, Khmer, New Tai Lue, Tai Tham, Balinese, Javanese and Tai Viet, a letter with its marks.
_UNSPACED_LETTER = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u1980-\u19df\u1a20-\u1aaf\u1b00-\u1b7f\ua980-\ua9ff\uaa60-\uaadf]"
)
_HALF_WIDTH_KATAKANA = re.compile("[\uff66-\uff9f]+")
_JOINERS = "\u200c\u200d"  # after a mark they shape a letter of the word, elsewhere they part words
# How something is drawn, not what it is: variation selectors, for text or emoji, and what encloses a sign.
_LOOKS = re.compile("[\u180b-\u180d\u180f\ufe00-\ufe0f\U000e0100-\U000e01ef]")
_SIGN = re.compile(
    "[\U0001f1e6-\U0001f1ff]{2}"  # a flag is two letters
    "|\\S(?:[\U0001f3fb-\U0001f3ff\U000e0020-\U000e007f\u20dd-\u20e4]|\u200d\\S)*"  # skin, region, keycap; a family
)


def rouge_scores(*, prediction: str, reference: str) -> dict[str, float]:
    """Return rouge1, rouge2 and rougeL as F1 in [0, 1]; an empty text against another scores 0."""
    if prediction.strip() == reference.strip():
        return dict.fromkeys(_TYPES, 1.0)
    scorer, tokenize = _scorer(_splitter(prediction + reference))
    scores = scorer.score(reference, prediction)
    longest = _longest_f1(tokenize(prediction), tokenize(reference))
    return {name: float(scores[name].fmeasure) for name in _OF_PIECES} | {"rougeL": longest}


def _longest_f1(prediction: Sequence[str], reference: Sequence[str]) -> float:
    """Return ROUGE-L's F1, the same number as rouge-score's, whose table takes half a minute for 6,000 words."""
    if not prediction or not reference:
        return 0.0
    common = common_length(prediction, reference)
    precision, recall = common / len(prediction), common / len(reference)
    return 2 * precision * recall / (precision + recall) if common else 0.0


def common_length(one: Sequence[str], other: Sequence[str]) -> int:
    """Return the length of a longest common subsequence, a row of the table at a time, as the bits of one number.

    Source: Hyyro 2004, "Bit-parallel LCS-length computation revisited": a bit is 0 where a row's length grows.
    """
    places: dict[str, int] = {}
    for at, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << at
    whole = (1 << len(one)) - 1
    row = whole
    for word in other:
        met = row & places.get(word, 0)
        row = (row + met | row - met) & whole
    return len(one) - row.bit_count()


def has_words(text: str) -> bool:
    """Tell whether the text holds a letter or digit of any script."""
    return any(letter.isalnum() for letter in text)


def _splitter(texts: str) -> str:
    """Return how both texts are split: into signs, by Unicode rules, or as rouge-score does."""
    if not has_words(texts):
        return "signs"
    return "unicode" if not texts.isascii() and any(map(_is_told, texts)) else "ascii"


def _is_told(letter: str) -> bool:
    return not letter.isascii() and (letter.isalnum() or _is_mark(letter))


def _is_mark(letter: str) -> bool:
    return unicodedata.category(letter) in ("Mn", "Mc") and not _LOOKS.match(letter)


@functools.cache
def _scorer(splitter: str) -> tuple[Any, Callable[[str], list[str]]]:
    # Imported here: it brings nltk, which only a run that scores text should wait for.
    from rouge_score import rouge_scorer, tokenizers

    makers: dict[str, Callable[[], Any]] = {
        "signs": _SignTokenizer,
        "unicode": _UnicodeTokenizer,
        "ascii": lambda: tokenizers.DefaultTokenizer(use_stemmer=True),
    }
    remembering = _Remembering(makers[splitter]())
    return rouge_scorer.RougeScorer(list(_OF_PIECES), tokenizer=remembering), remembering.tokenize


class _Remembering:
    """Splits a text once: every cell of a sweep is compared with the same references."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenize = functools.lru_cache(maxsize=4096)(tokenizer.tokenize)


class _SignTokenizer:
    """Splits a text that has no word into its signs; an emoji of several code points is one."""

    def tokenize(self, text: str) -> list[str]:
        """Return everything that is drawn, white space left out."""
        return _SIGN.findall(_LOOKS.sub("", unicodedata.normalize("NFC", text)))


class _UnicodeTokenizer:
    """Splits like rouge-score's own tokenizer, but keeps letters, digits and combining marks of every script."""

    def __init__(self) -> None:
        from nltk.stem import porter  # type: ignore[import-untyped]

        self._stem: Callable[[str], str] = porter.PorterStemmer().stem

    def tokenize(self, text: str) -> list[str]:
        """Return the lower-case tokens of `text`; ASCII words over three letters are stemmed."""
        return [self._stem(word) if len(word) > 3 and word.isascii() else word for word in _words(_composed(text))]


def _composed(text: str) -> str:
    """Return the text in lower case and composed form; half-width katakana as what it is half of."""
    wide = _HALF_WIDTH_KATAKANA.sub(lambda run: unicodedata.normalize("NFKC", run[0]), text)
    return unicodedata.normalize("NFC", wide).lower()


def _words(text: str) -> Iterator[str]:
    """Yield words of spaced scripts and single letters of the others, each with the marks that follow it."""
    word, takes_letters = "", False
    for letter in text:
        if _IDEOGRAPH.match(letter):
            yield from (word, letter) if word else (letter,)
            word = ""
        elif letter.isalnum():
            alone = _UNSPACED_LETTER.match(letter) is not None
            if word and (alone or not takes_letters):
                yield word
                word = ""
            word, takes_letters = word + letter, not alone
        elif word and _is_mark(letter):
            word += letter
        elif word and not (letter in _JOINERS and _is_mark(word[-1])):
            yield word
            word = ""
    if word:
        yield word


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


_EPSILON = 1e-8  # in that package's F1, so that even equal texts stay this much below 1


def rouge_l_released(*, prediction: str, reference: str) -> float:
    """Return the F1 in [0, 1); an empty text scores 0, where the package stops the run with an error.

    Words are split at white space, with case, punctuation and end tokens as they are; no stemming.
    """
    stated, wanted = _sentences(prediction), _sentences(reference)
    if not stated or not wanted:
        return 0.0
    common = {word for one in wanted for other in stated for word in _common_subsequence(one, other)}
    precision = len(common) / len({word for sentence in stated for word in sentence})
    recall = len(common) / len({word for sentence in wanted for word in sentence})
    return 2.0 * precision * recall / (precision + recall + _EPSILON)


def _sentences(text: str) -> list[list[str]]:
    """White space between two full stops is a sentence of one empty word."""
    return [part.split() or [""] for part in text.split(".") if part]


def _common_subsequence(wanted: list[str], stated: list[str]) -> list[str]:
    """Return a longest common subsequence; of several, the one that goes back through `stated` first."""
    lengths = [[0] * (len(stated) + 1) for _ in range(len(wanted) + 1)]
    for row, word in enumerate(wanted, start=1):
        for column, other in enumerate(stated, start=1):
            above, before = lengths[row - 1][column], lengths[row][column - 1]
            lengths[row][column] = lengths[row - 1][column - 1] + 1 if word == other else max(above, before)
    words = []
    row, column = len(wanted), len(stated)
    while row and column:
        if wanted[row - 1] == stated[column - 1]:
            words.append(wanted[row - 1])
            row, column = row - 1, column - 1
        elif lengths[row - 1][column] > lengths[row][column - 1]:
            row -= 1
        else:
            column -= 1
    return words


def fact_scores(*, stated: frozenset[Hashable], true: frozenset[Hashable], noun: str = "objects") -> dict[str, float]:
    """Return the share of true facts that are stated, and the F1 of stated against true.

    An answer that states nothing scores 0; `true` must not be empty. `noun` begins the names.
    """
    right = len(stated & true)
    return {f"{noun}_recalled_fraction": right / len(true), f"{noun}_f1": 2 * right / (len(stated) + len(true))}
