"""ROUGE-L as Elastic Cache's code reports it, which is another number than ROUGE-L.

That code takes `rouge-l` of the package rouge 1.0.1: texts are cut at every full stop, words are
counted once however often they occur, and what counts is the union, over all pairs of sentences, of
the words of one longest common subsequence each. Word order between sentences is lost and repetition
costs nothing, so scores are higher than the F1 of one longest common subsequence.

    rouge_l_released(prediction="a cat. a cat. a cat.", reference="a cat.")  # 1.0, where rougeL is 0.5
"""

from __future__ import annotations

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
