"""R4: compared cells have the same samples, and a sample is the same in each of them.

A3: tokens reported are tokens produced, and every answer ends at most once.

The cache counts entries at every step, so the number of steps that were really taken is known beside the
number of tokens that each answer is said to have: their ratio is the number of layers, the same whole
number in all cells of a model.

R8: ROUGE recomputed from the stored texts.

A4: how long the answers are beside the full cache's; a row outside of 10 % says so.

R5: the full cache against itself scores 1.0 in every answer, of every turn, and has a divergence of exactly 0.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from kvbench.audit.budgets import steps_taken
from kvbench.audit.evidence import Cell, Check, Peers
from kvbench.measures import MAX_TURNS
from kvbench.tasks.rouge import has_words, rouge_scores

_SAME = (
    *("cluster", "reference", "full_text", "num_compared_tokens"),
    *(f"turn{turn}_{part}" for turn in range(1, MAX_TURNS + 1) for part in ("question", "reference", "full_text")),
)
_LENGTHS = ("max_new_tokens", "max_turns")


def _problems(cell: Cell, peers: Peers) -> Iterator[str]:
    if _digest(cell) is not None and _digest(cell) != _usual_digest(peers):
        yield "its prompts are not those of the other cells (prompts.digest)"
    usual = _usual_ids(peers)
    missing, added = sorted(usual - set(cell.rows)), sorted(set(cell.rows) - usual)
    if missing:
        yield f"{len(missing)} samples of the other cells are not here, {missing[0]} for one"
    if added:
        yield f"{len(added)} samples are in no other cell, {added[0]} for one"
    for identity, row in cell.rows.items():
        said = _usual_rows(peers, _limits(cell))[identity]
        different = [name for name in _SAME if name in row and row[name] != said[name]]
        if different:
            yield f"{identity}: {different[0]} is not that of the other cells"
            break


def _digest(cell: Cell) -> str | None:
    prompts = cell.body.get("prompts")
    return str(prompts.get("digest")) if isinstance(prompts, dict) else None


@lru_cache(maxsize=8)
def _usual_digest(peers: Peers) -> str | None:
    found = Counter(digest for cell in peers.usable if cell.samples and (digest := _digest(cell)) is not None)
    return found.most_common(1)[0][0] if found else None


@lru_cache(maxsize=8)
def _usual_ids(peers: Peers) -> frozenset[str]:
    return Counter(frozenset(cell.rows) for cell in peers.usable if cell.samples).most_common(1)[0][0]


@lru_cache(maxsize=8)
def _usual_rows(peers: Peers, limits: tuple[object, ...]) -> dict[str, dict[str, object]]:
    """Return what most cells with the same limits of length say; of equally many the full cache's."""
    said: dict[str, dict[str, Counter[object]]] = {}
    for cell in peers.usable:
        if _limits(cell) == limits:
            for identity, row in cell.rows.items():
                counters = said.setdefault(identity, {name: Counter() for name in _SAME})
                for name in _SAME:
                    counters[name].update([row[name]] if name in row else ())
    return {
        identity: {name: most[0][0] for name, counter in counters.items() if (most := counter.most_common(1))}
        for identity, counters in said.items()
    }


def _limits(cell: Cell) -> tuple[object, ...]:
    tasks = [cell.task(task) or {} for task in ("Generation", "Fidelity", "MultiTurn")]
    return tuple(task.get(name) for task in tasks for name in _LENGTHS)


SAMPLES_CHECK = Check(
    id="R4",
    title="compared cells hold the same samples",
    meaning="numbers of different samples are compared, or samples were exchanged",
    applies=lambda cell, peers: (
        cell.usable and bool(cell.samples) and sum(bool(other.samples) for other in peers.usable) > 1
    ),
    problems=_problems,
)


def _tokens_problems(cell: Cell, peers: Peers) -> Iterator[str]:
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
    problems=_tokens_problems,
)


_TOLERANCE = 1e-6
_OLD = {"Generation": "greedy_v1", "MultiTurn": "one_cache_v1"}  # dropped combining marks, and texts without a word
_HIDDEN = "***"  # stands where a secret was taken out


def _text_scores_problems(cell: Cell, peers: Peers) -> Iterator[str]:
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
    problems=_text_scores_problems,
)


_NEAR = 0.1


def _lengths_problems(cell: Cell, peers: Peers) -> Iterator[str]:
    if cell.value("length_ratio") is None and any(row.get("length_ratio") is not None for row in cell.samples):
        yield "answers have lengths, and the cell tells none"


def _notes(cell: Cell, peers: Peers) -> Iterator[str]:
    ratio = cell.value("length_ratio")
    if ratio is not None and abs(ratio - 1) > _NEAR:
        yield f"answers of {100 * ratio:.0f} % of the full cache's length: outside of 10 %"


LENGTHS_CHECK = Check(
    id="A4",
    title="the length of answers beside the full cache's is told",
    meaning="short or endless answers are compared with whole ones, and nobody is told",
    applies=lambda cell, peers: cell.usable and cell.task("Generation") is not None,
    problems=_lengths_problems,
    notes=_notes,
)


_EXACT = {"kl_to_full": 0.0, "top1_agreement_fraction": 1.0, "length_ratio": 1.0, "realised_budget_fraction": 1.0} | {
    f"rouge{kind}_vs_full": 1.0 for kind in "12L"
}
_PREFIXES = ("", *(f"turn{turn}_" for turn in range(1, MAX_TURNS + 1)))


def _full_itself_problems(cell: Cell, peers: Peers) -> Iterator[str]:
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


FULL_ITSELF_CHECK = Check(
    id="R5",
    title="the full cache is equal to itself",
    meaning="the row that everything is compared with is not the full cache's, or the machine computes unreliably",
    applies=lambda cell, peers: cell.usable and cell is peers.full and bool(cell.samples),
    problems=_full_itself_problems,
)
