"""A3: tokens reported are tokens produced, and every answer ends at most once.

The cache counts entries at every step, so the number of steps that were really taken is known beside the
number of tokens that each answer is said to have: their ratio is the number of layers, the same whole
number in all cells of a model.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from kvbench.audit.check import Check
from kvbench.audit.evidence import Cell, Peers
from kvbench.audit.steps import steps_taken


def _problems(cell: Cell, peers: Peers) -> Iterator[str]:
    generation = cell.task("Generation")
    if generation is not None:
        most = generation.get("max_new_tokens", 0)
        for row in cell.samples:
            if problem := _of_row(row, most, _full_tokens(cell, peers, row)):
                yield f"{row.get('id')}: {problem}"
                break
        yield from _steps(cell, peers)
    yield from _scored(cell, peers)


def _full_tokens(cell: Cell, peers: Peers, row: Mapping[str, Any]) -> int | None:
    """Return how many tokens the full cache's answer has, from its own cell."""
    full = peers.full
    if full is None or full.task("Generation") != cell.task("Generation"):
        return None
    count = full.rows.get(str(row.get("id")), {}).get("num_new_tokens")
    return count if isinstance(count, int) else None


def _of_row(row: Mapping[str, Any], most: int, full_tokens: int | None) -> str | None:
    count, text = row.get("num_new_tokens"), row.get("text")
    if not isinstance(count, int) or not isinstance(text, str):
        return "no text, or no number of tokens"
    if not 0 <= count <= most:
        return f"{count} tokens, where 0 to {most} are possible"
    if text.strip() and not count:
        return "a text of no tokens"
    if full_tokens is None:
        return None
    ratio = row.get("length_ratio")
    expected = count / full_tokens if full_tokens else (None if count else 1.0)
    if expected is not None and (ratio is None or abs(ratio - expected) > 1e-9):
        return f"{count} tokens beside the full cache's {full_tokens}, and a length ratio of {ratio}"
    parts = row.get("first_divergence_tokens")
    if parts is None and (count != full_tokens or text != row.get("full_text")):
        return "it differs from the full cache's answer, and no first different token is named"
    if parts is not None and not 0 <= parts <= min(count, full_tokens):
        return f"the first different token is {parts}, of {count} and {full_tokens}"
    return None


@lru_cache(maxsize=65536)
def _layers(cell: Cell) -> float | None:
    """Return counts of entries per step taken."""
    steps = steps_taken(cell)
    counts = cell.number("realised_budget_fraction", "n")
    return counts / steps if counts is not None and steps > 0 else None


@lru_cache(maxsize=8)
def _usual_layers(peers: Peers) -> float:
    return Counter(found for cell in peers.usable if (found := _layers(cell)) is not None).most_common(1)[0][0]


def _steps(cell: Cell, peers: Peers) -> Iterator[str]:
    layers = _layers(cell)
    if layers is None:
        return
    usual = _usual_layers(peers)
    if layers != int(layers) or layers != usual:
        yield (
            f"its answers have {layers:.4g} counts of entries per token, where each of the model's layers counts once"
            f"{f' (other cells: {usual:.4g})' if usual != layers else ''}"
        )


def _scored(cell: Cell, peers: Peers) -> Iterator[str]:
    """Every cell scores the same tokens of a reference: its own and one end token."""
    for identity, row in cell.rows.items():
        count = row.get("num_scored_tokens")
        if count is not None and count != _usual_counts(peers)[identity]:
            yield f"{identity}: {count} tokens scored, in other cells {_usual_counts(peers)[identity]}"
            break
    ends = [
        row["num_scored_tokens"] - row["num_new_tokens"]
        for row in cell.samples
        if row.get("text") and row["text"] == row.get("reference")
        if row.get("num_scored_tokens") is not None and row.get("num_new_tokens") is not None
    ]
    if ends and statistics.median(ends) > 1:
        yield f"{statistics.median(ends):g} end tokens are scored after answers that equal their reference"


@lru_cache(maxsize=8)
def _usual_counts(peers: Peers) -> dict[str, int]:
    """Return the scored tokens of each sample that most cells tell; of equally many the full cache's."""
    said: dict[str, Counter[int]] = {}
    for cell in peers.usable:
        for identity, row in cell.rows.items():
            if row.get("num_scored_tokens") is not None:
                said.setdefault(identity, Counter())[row["num_scored_tokens"]] += 1
    return {identity: counter.most_common(1)[0][0] for identity, counter in said.items()}


TOKENS_CHECK = Check(
    id="A3",
    title="tokens reported are tokens produced, at most one end token",
    meaning="an answer was cut or made longer after the run, or likelihoods are spread over tokens never scored",
    applies=lambda cell, peers: (
        cell.usable and any("num_new_tokens" in row or "num_scored_tokens" in row for row in cell.samples)
    ),
    problems=_problems,
)
