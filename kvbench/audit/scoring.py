"""A3, A4, R4, R5, R8: samples, answers and their scores, beside the stored texts and the other cells.

The cache counts entries at every step, so the number of steps really taken is known beside the number of tokens that
each answer is said to have: their ratio is the number of layers, the same whole number in all cells of a model.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any, TypeVar

from kvbench.audit.budgets import steps_taken
from kvbench.audit.evidence import Cell, Note, Peers, answers_in, check, is_number, usual
from kvbench.measures import MAX_TURNS, has_other_length
from kvbench.tasks.rouge import has_words, rouge_scores

_Value = TypeVar("_Value")
_TURNS = tuple(f"turn{turn}_" for turn in range(1, MAX_TURNS + 1))
_PREFIXES = ("", *_TURNS)
_SAME = (
    *("cluster", "reference", "full_text", "num_compared_tokens"),
    *(f"{turn}{part}" for turn in _TURNS for part in ("question", "reference", "full_text")),
)
_LENGTHS = ("max_new_tokens", "max_turns", "natural_stop", "temperature", "seed")  # what texts of full depend on
_TOLERANCE = 1e-6
_OLD = {"Generation": "greedy_v1", "MultiTurn": "one_cache_v1"}  # dropped combining marks, and texts without a word
_TEXT = re.compile(r"(turn\d+_)?text")
_MEAN = re.compile(r"rouge[12L]_vs_(full|reference)|.*_fraction|.*_f1|length_ratio")  # of a row of several draws
_HIDDEN = "***"  # stands where a secret was taken out
_EXACT = {"kl_to_full": 0.0, "top1_agreement_fraction": 1.0, "length_ratio": 1.0, "realised_budget_fraction": 1.0} | {
    f"rouge{kind}_vs_full": 1.0 for kind in "12L"
}


@check(
    "R4",
    "compared cells hold the same samples",
    "numbers of different samples are compared, or samples were exchanged",
    lambda cell, peers: cell.usable and bool(cell.samples) and sum(bool(other.samples) for other in peers.usable) > 1,
)
def samples(cell: Cell, peers: Peers) -> Iterator[str]:
    """Compare prompts, ids, and what a sample is whatever the policy, with those of most cells."""
    if _digest(cell) is not None and _digest(cell) != _most_say(peers, _digest):
        yield "its prompts are not those of the other cells (prompts.digest)"
    ids = _most_say(peers, _ids) or frozenset()
    missing, added = sorted(ids - set(cell.rows)), sorted(set(cell.rows) - ids)
    if missing:
        yield f"{len(missing)} samples of the other cells are not here, {missing[0]} for one"
    if added:
        yield f"{len(added)} samples are in no other cell, {added[0]} for one"
    for identity, row in cell.rows.items():
        said = _usual_rows(peers, _SAME, _limits(cell))[identity]
        different = [name for name in _SAME if name in row and row[name] != said[name]]
        if different:
            yield f"{identity}: {different[0]} is not that of the other cells"
            break


def _digest(cell: Cell) -> str | None:
    prompts = cell.body.get("prompts")
    return str(prompts.get("digest")) if cell.samples and isinstance(prompts, dict) else None


def _ids(cell: Cell) -> frozenset[str] | None:
    return frozenset(cell.rows) or None


@lru_cache(maxsize=32)
def _most_say(peers: Peers, of: Callable[[Cell], _Value | None]) -> _Value | None:
    """Return what most cells have, of those that have any; of equally many the full cache's."""
    return usual(found for cell in peers.usable if (found := of(cell)) is not None)


@lru_cache(maxsize=16)
def _usual_rows(
    peers: Peers, names: tuple[str, ...], limits: tuple[object, ...] | None = None
) -> dict[str, dict[str, Any]]:
    """Return what most cells, of those with the same limits of length, say in each row; of equally many the full's."""
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for cell in peers.usable:
        if limits is None or _limits(cell) == limits:
            for identity, row in cell.rows.items():
                rows.setdefault(identity, []).append(row)
    return {
        identity: {name: usual(row[name] for row in some if row.get(name) is not None) for name in names}
        for identity, some in rows.items()
    }


def _limits(cell: Cell) -> tuple[object, ...]:
    tasks = [cell.task(task) or {} for task in ("Generation", "Fidelity", "MultiTurn")]
    return tuple(task.get(name) for task in tasks for name in _LENGTHS)


@check(
    "A3",
    "tokens reported are tokens produced, at most one end token",
    "an answer was cut or made longer after the run, or likelihoods are spread over tokens never scored",
    lambda cell, peers: (
        cell.usable and any("num_new_tokens" in row or "num_scored_tokens" in row for row in cell.samples)
    ),
)
def tokens(cell: Cell, peers: Peers) -> Iterator[str]:
    """Compare tokens told with limits, texts, steps of the cache, and the tokens that other cells scored."""
    generation, full = cell.task("Generation"), peers.full
    if generation is not None:
        alike = full.rows if full is not None and full.task("Generation") == generation else {}
        for row in cell.samples:
            most, full_tokens = generation.get("max_new_tokens", 0), None
            if "draws" not in row:  # else its scores are means over them
                full_tokens = alike.get(str(row.get("id")), {}).get("num_new_tokens")
            problems = (_answer_problem(answer, most, full_tokens) for answer in answers_in(row))
            if problem := next(filter(None, problems), None):
                yield f"{row.get('id')}: {problem}"
                break
        layers, others = _layers(cell), _most_say(peers, _layers)
        if layers is not None and (layers != int(layers) or layers != others):
            yield (
                f"its answers have {layers:.4g} counts of entries per token, where each of the model's layers counts "
                f"once{f' (other cells: {others:.4g})' if others != layers else ''}"
            )
    # Every cell scores the same tokens of a reference: its own and one end token.
    for identity, row in cell.rows.items():
        count, said = row.get("num_scored_tokens"), _usual_rows(peers, ("num_scored_tokens",))[identity]
        if count is not None and count != said["num_scored_tokens"]:
            yield f"{identity}: {count} tokens scored, in other cells {said['num_scored_tokens']}"
            break
    ends = [
        row["num_scored_tokens"] - row["num_new_tokens"]
        for row in cell.samples
        if row.get("text") and row["text"] == row.get("reference")
        if row.get("num_scored_tokens") is not None and row.get("num_new_tokens") is not None
    ]
    if ends and statistics.median(ends) > 1:
        yield f"{statistics.median(ends):g} end tokens are scored after answers that equal their reference"


def _answer_problem(row: Mapping[str, Any], most: int, full_tokens: object) -> str | None:
    count, text = row.get("num_new_tokens"), row.get("text")
    if not isinstance(count, int) or not isinstance(text, str):
        return "no text, or no number of tokens"
    if not 0 <= count <= most:
        return f"{count} tokens, where 0 to {most} are possible"
    if text.strip() and not count:
        return "a text of no tokens"
    if not isinstance(full_tokens, int):
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
    steps, counts = steps_taken(cell), cell.value("realised_budget_fraction", "n")
    return counts / steps if counts is not None and steps > 0 else None


@check(
    "A4",
    "the length of answers beside the full cache's is told",
    "short or endless answers are compared with whole ones, and nobody is told",
    lambda cell, peers: cell.usable and cell.task("Generation") is not None,
)
def lengths(cell: Cell, peers: Peers) -> Iterator[str]:
    """Look for the ratio of lengths, and say where it is far from 1."""
    ratio = cell.value("length_ratio")
    if ratio is None and any(row.get("length_ratio") is not None for row in cell.samples):
        yield "answers have lengths, and the cell tells none"
    if ratio is not None and has_other_length(ratio):
        yield Note(f"answers of {100 * ratio:.0f} % of the full cache's length: outside of 10 %")


@check(
    "R8",
    "ROUGE follows from the stored texts",
    "scores or texts were changed after the run",
    lambda cell, peers: cell.usable and any(row.get("text") or row.get("turn1_text") for row in cell.samples),
)
def scores(cell: Cell, peers: Peers) -> Iterator[str]:
    """Score the texts of the rows again, up to the first that differs."""
    is_old = any((cell.task(name) or {}).get("protocol") == old for name, old in _OLD.items())
    for row in cell.samples:
        for prefix in sorted(name.removesuffix("text") for name in row if _TEXT.fullmatch(name)):
            problem = _draws_problem(row, is_old) if "draws" in row else _score_problem(row, prefix, is_old)
            if problem:
                yield f"{row.get('id')}: {problem}"
                return


def _draws_problem(row: Mapping[str, Any], is_old: bool) -> str | None:
    """Score each draw again, and take the means over them."""
    draws = answers_in(row)
    for number, draw in enumerate(draws):
        if problem := _score_problem({"reference": row.get("reference"), **draw}, "", is_old):
            return f"draw {number}: {problem}"
    for name in sorted(name for name in row if _MEAN.fullmatch(name)):
        each = [draw[name] for draw in draws if is_number(draw.get(name))]
        mean = statistics.fmean(each) if each else None
        if is_number(row[name]) and (mean is None or abs(row[name] - mean) > _TOLERANCE):
            return f"{name} is {row[name]:.4g}, its draws give {'none' if mean is None else format(mean, '.4g')}"
    return None


def _score_problem(row: Mapping[str, Any], prefix: str, is_old: bool) -> str | None:
    text = row[f"{prefix}text"]
    for against, field in (("full", "full_text"), ("reference", "reference")):
        other = row.get(f"{prefix}{field}")
        if not isinstance(text, str) or not isinstance(other, str) or _HIDDEN in text + other:
            continue
        # Only of some texts the older protocols surely gave the same scores.
        both = text + other
        alike = not is_old or (both.isascii() and (has_words(both) or not both.strip()))
        if (against == "reference" and not other) or not alike:
            continue
        for name, score in _rouge(text, other).items():
            stored = row.get(f"{prefix}{name}_vs_{against}")
            if stored is not None and abs(stored - score) > _TOLERANCE:
                return f"{prefix}{name}_vs_{against} is {stored:.4g}, its texts give {score:.4g}"
    return None


@lru_cache(maxsize=65536)
def _rouge(prediction: str, reference: str) -> dict[str, float]:
    return rouge_scores(prediction=prediction, reference=reference)


@check(
    "R5",
    "the full cache is equal to itself",
    "the row that everything is compared with is not the full cache's, or the machine computes unreliably",
    lambda cell, peers: cell.usable and cell is peers.full and bool(cell.samples),
)
def full_itself(cell: Cell, peers: Peers) -> Iterator[str]:
    """Look for the first number or row of the full cache that differs from the full cache's."""
    for name, expected in ((f"{prefix}{name}", one) for prefix in _PREFIXES for name, one in _EXACT.items()):
        value = cell.value(name)
        if value is not None and value != expected:
            yield f"{name} is {value:.6g} and must be {expected:g}"
            return
    for row in cell.samples:
        for prefix in _PREFIXES:
            if row.get(f"{prefix}text") != row.get(f"{prefix}full_text"):
                yield f"{row.get('id')}: its {prefix}text is not the full cache's"
                return
        if row.get("kl_sum", 0.0) != 0.0 or row.get("num_agreeing_tokens") != row.get("num_compared_tokens"):
            yield f"{row.get('id')}: it differs from the full cache"
            return
