"""R8: ROUGE recomputed from the stored texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from kvbench.audit.check import Check
from kvbench.audit.evidence import Cell, Peers
from kvbench.tasks.rouge import has_words, rouge_scores

_TOLERANCE = 1e-6
_OLD = {"Generation": "greedy_v1", "MultiTurn": "one_cache_v1"}  # dropped combining marks, and texts without a word
_HIDDEN = "***"  # stands where a secret was taken out


def _problems(cell: Cell, peers: Peers) -> Iterator[str]:
    is_old = any((cell.task(name) or {}).get("protocol") == old for name, old in _OLD.items())
    for row in cell.samples:
        for prefix in sorted({name.removesuffix("text") for name in row if name in ("text", *_TURN_TEXTS)}):
            if problem := _wrong(row, prefix, is_old):
                yield f"{row.get('id')}: {problem}"
                return


_TURN_TEXTS = tuple(f"turn{number}_text" for number in range(1, 33))


def _wrong(row: Mapping[str, Any], prefix: str, is_old: bool) -> str | None:
    text = row[f"{prefix}text"]
    for against, field in (("full", "full_text"), ("reference", "reference")):
        other = row.get(f"{prefix}{field}")
        if not isinstance(text, str) or not isinstance(other, str) or _HIDDEN in text + other:
            continue
        if (against == "reference" and not other) or (is_old and not _is_scored_alike(text + other)):
            continue
        for name, score in _scores(text, other).items():
            stored = row.get(f"{prefix}{name}_vs_{against}")
            if stored is not None and abs(stored - score) > _TOLERANCE:
                return f"{prefix}{name}_vs_{against} is {stored:.4g}, its texts give {score:.4g}"
    return None


def _is_scored_alike(texts: str) -> bool:
    """Whether the older protocols surely gave these texts the same scores."""
    return texts.isascii() and (has_words(texts) or not texts.strip())


@lru_cache(maxsize=65536)
def _scores(prediction: str, reference: str) -> dict[str, float]:
    return rouge_scores(prediction=prediction, reference=reference)


SCORES_CHECK = Check(
    id="R8",
    title="ROUGE follows from the stored texts",
    meaning="scores or texts were changed after the run",
    applies=lambda cell, peers: cell.usable and any(r.get("text") or r.get("turn1_text") for r in cell.samples),
    problems=_problems,
)
