"""R8: ROUGE recomputed from the stored texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from kvbench.audit.check import Check
from kvbench.audit.evidence import Cell, Peers
from kvbench.metrics.rouge import rouge_scores

_TOLERANCE = 1e-6
_HIDDEN = "***"  # stands where a secret was taken out


def _problems(cell: Cell, peers: Peers) -> Iterator[str]:
    for row in cell.samples:
        for prefix in sorted({name.removesuffix("text") for name in row if name in ("text", *_TURN_TEXTS)}):
            if problem := _wrong(row, prefix):
                yield f"{row.get('id')}: {problem}"
                return


_TURN_TEXTS = tuple(f"turn{number}_text" for number in range(1, 33))


def _wrong(row: Mapping[str, Any], prefix: str) -> str | None:
    text = row[f"{prefix}text"]
    for against, field in (("full", "full_text"), ("reference", "reference")):
        other = row.get(f"{prefix}{field}")
        if not isinstance(text, str) or not isinstance(other, str) or _HIDDEN in text + other:
            continue
        if against == "reference" and not other:
            continue
        for name, score in _scores(text, other).items():
            stored = row.get(f"{prefix}{name}_vs_{against}")
            if stored is not None and abs(stored - score) > _TOLERANCE:
                return f"{prefix}{name}_vs_{against} is {stored:.4g}, its texts give {score:.4g}"
    return None


@lru_cache(maxsize=65536)
def _scores(prediction: str, reference: str) -> dict[str, float]:
    return rouge_scores(prediction=prediction, reference=reference)


CHECK = Check(
    id="R8",
    title="ROUGE follows from the stored texts",
    meaning="scores or texts were changed after the run",
    applies=lambda cell, peers: cell.usable and any(r.get("text") or r.get("turn1_text") for r in cell.samples),
    problems=_problems,
)
