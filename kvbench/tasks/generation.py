"""Greedy answers under the policy, compared with the full cache's and with the reference.

The ROUGE-L of Elastic Cache's code on the texts that it compares: special tokens are left in.

Where in two texts the first different token stands, so that a reader sees the very token and not a word near it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from kvbench.datasets.base import Dataset, Example
from kvbench.errors import ConfigError, MeasureError
from kvbench.models.inputs import answer_text, reference_text
from kvbench.models.loader import LoadedModel
from kvbench.stats.intervals import mean_interval
from kvbench.tasks.decode import CacheSetting, greedy
from kvbench.tasks.prompts import Part
from kvbench.tasks.rouge import fact_scores, first_divergence, length_ratio, rouge_l_released, rouge_scores
from kvbench.tasks.task import Answers, BatchTask, Bench, Payload, TaskResult

if TYPE_CHECKING:
    from kvbench.cache import PolicyCache


def add_released_scores(
    rows: Mapping[str, dict[str, Any]],
    loaded: LoadedModel,
    examples: Sequence[Example],
    answers: Sequence[list[int]],
    full: Mapping[str, list[int]],
    max_new_tokens: int,
) -> None:
    """Add rougeL_released_vs_full to the row of each example; an answer below `max_new_tokens` had an end token."""
    for example, answer in zip(examples, answers, strict=True):
        texts = [_text(loaded, tokens, max_new_tokens) for tokens in (answer, full[example.id])]
        rows[example.id]["rougeL_released_vs_full"] = rouge_l_released(prediction=texts[0], reference=texts[1])


def _text(loaded: LoadedModel, tokens: Sequence[int], max_new_tokens: int) -> str:
    ended = [*tokens, loaded.eos_token_id] if len(tokens) < max_new_tokens else list(tokens)
    text: str = loaded.tokenizer.decode(ended)
    return text.strip()


PLACES = ("divergence_starts_at", "divergence_ends_at", "full_divergence_ends_at")


def divergence(loaded: LoadedModel, answer: Sequence[int], full: Sequence[int]) -> dict[str, int | None]:
    """Return first_divergence_tokens, the first token in which the answers differ, and where it stands in the texts.

    divergence_starts_at, in characters, is the same in both; the token ends at divergence_ends_at in the answer and
    at full_divergence_ends_at in the full cache's. In a text that ends there it has no length. Equal answers have
    no place.
    """
    at = first_divergence(answer, full)
    if at is None:
        return {"first_divergence_tokens": None}
    start, end = _place(loaded, answer, at)
    full_start, full_end = _place(loaded, full, at)
    places = (min(start, full_start), end, full_end)
    return {"first_divergence_tokens": at, **dict(zip(PLACES, places, strict=True))}


def _place(loaded: LoadedModel, tokens: Sequence[int], at: int) -> tuple[int, int]:
    """Begin and end of the token in the text without white space around it, as records hold it."""
    text = answer_text(loaded, tokens)
    whole = _decoded(loaded, tokens)
    lead = len(whole) - len(whole.lstrip())
    places = (len(_decoded(loaded, tokens[:count])) - lead for count in (at, at + 1))
    start, end = (max(0, min(len(text), place)) for place in places)
    return start, max(start, end)


def _decoded(loaded: LoadedModel, tokens: Sequence[int]) -> str:
    text: str = loaded.tokenizer.decode(list(tokens), skip_special_tokens=True)
    return text


_UNITS = {"first_divergence_tokens": "tokens"}
_DESCRIPTIVE = ("text", "full_text", "reference", "num_new_tokens", *PLACES)


@dataclass(frozen=True, kw_only=True)
class Generation(BatchTask):
    """Greedy decoding up to `max_new_tokens`, scored per example.

    In every run the full cache must give its stored answers to the first batch again, token for token.
    `released_rouge` adds the ROUGE-L of Elastic Cache's code (kvbench.tasks.generation).
    """

    protocol: ClassVar[str] = "greedy_v2"
    hides_question: ClassVar[bool] = True

    max_new_tokens: int = 160
    released_rouge: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"task.generation.max_new_tokens is {self.max_new_tokens}; it must be at least 1")

    def measure(self, bench: Bench, part: Part) -> Payload:
        """Answer one batch, compare, and note how many entries were really held at every step."""
        full = full_answers(bench, self.max_new_tokens)
        bench.prompts.once(
            ("reproduces", self.max_new_tokens), lambda: _check_reproduces(bench, part, full, self.max_new_tokens)
        )
        held = HeldEntries()
        answers = _greedy(bench, part, bench.setting, self.max_new_tokens, held.note)
        pairs = zip(part.examples, answers, strict=True)
        rows = {example.id: _row(bench, example, answer, full[example.id]) for example, answer in pairs}
        if self.released_rouge:
            add_released_scores(rows, bench.loaded, part.examples, answers, full, self.max_new_tokens)
        return {"rows": rows, "held": held.as_payload()}

    def summarise(self, bench: Bench, payloads: Sequence[Payload]) -> TaskResult:
        """Average over examples."""
        result, held = TaskResult(), HeldEntries()
        for payload in payloads:
            result.samples |= payload["rows"]
            held.join(payload["held"])
        _summarise(bench, result)
        held.report(result)
        return result


def _greedy(
    bench: Bench,
    part: Part,
    setting: CacheSetting,
    max_new_tokens: int,
    on_step: Callable[[PolicyCache, list[bool]], None] | None = None,
) -> list[list[int]]:
    return greedy(
        part.decoding(setting, max_new_tokens),
        end_token_ids=bench.loaded.end_token_ids,
        max_new_tokens=max_new_tokens,
        on_step=on_step,
    )


def full_answers(bench: Bench, max_new_tokens: int) -> Answers:
    """Return the full cache's answers by example id, from the store or computed now."""

    def compute() -> Answers:
        answers: Answers = {}
        prompts = bench.own_prompts()
        for part in map(prompts.part, range(len(prompts))):
            texts = _greedy(bench, part, bench.full, max_new_tokens)
            answers |= {example.id: text for example, text in zip(part.examples, texts, strict=True)}
        return answers

    answers: Answers = bench.prompts.once(
        ("full answers", max_new_tokens), lambda: bench.answers.get(max_new_tokens, compute)
    )
    missing = [example.id for example in bench.examples if example.id not in answers]
    if missing:
        raise MeasureError(f"the stored full answers lack {missing[0]}; delete results/full_answers and run again")
    return answers


def _check_reproduces(bench: Bench, part: Part, full: Answers, max_new_tokens: int) -> None:
    first = part if part.number == 0 else bench.own_prompts().part(0)
    again = _greedy(bench, first, bench.full, max_new_tokens)
    for example, answer in zip(first.examples, again, strict=True):
        if answer != full[example.id]:
            raise MeasureError(
                f"the full cache does not reproduce its stored answer to {example.id} (first difference at token "
                f"{first_divergence(answer, full[example.id])}); delete results/full_answers and run again"
            )


def _row(bench: Bench, example: Example, answer: list[int], full: list[int]) -> dict[str, Any]:
    text, full_text = answer_text(bench.loaded, answer), answer_text(bench.loaded, full)
    reference = reference_text(bench.loaded, example)
    row: dict[str, Any] = {"text": text, "full_text": full_text, "reference": reference}
    row |= text_scores(text, full_text, reference)
    row["length_ratio"] = length_ratio(len(answer), len(full))
    row |= divergence(bench.loaded, answer, full)
    return row | {"num_new_tokens": len(answer)} | _facts(bench.dataset, example, text)


def text_scores(text: str, full_text: str, reference: str) -> dict[str, float]:
    """Return ROUGE against the full cache's answer, and against the reference unless that is empty."""
    scores = {f"{name}_vs_full": s for name, s in rouge_scores(prediction=text, reference=full_text).items()}
    if reference:
        found = rouge_scores(prediction=text, reference=reference)
        scores |= {f"{name}_vs_reference": score for name, score in found.items()}
    return scores


def _facts(dataset: Dataset, example: Example, text: str) -> dict[str, float]:
    if example.facts is None:
        return {}
    return fact_scores(stated=dataset.facts_in(text), true=example.facts, noun=example.fact_noun)


def _summarise(bench: Bench, result: TaskResult) -> None:
    rows = [result.samples[example.id] for example in bench.examples]
    for name in dict.fromkeys(key for row in rows for key in row if key not in _DESCRIPTIVE):
        scored = [(row[name], c) for row, c in zip(rows, bench.clusters, strict=True) if row.get(name) is not None]
        interval = mean_interval([value for value, _ in scored], [cluster for _, cluster in scored])
        result.measure(name, interval, _UNITS.get(name, ""))


@dataclass(kw_only=True)
class HeldEntries:
    """Entries held at each step, over layers and rows still being answered; host counts only.

    by_seen: for each number of tokens seen, how many counts there are, their sum and their largest.
    """

    by_seen: dict[int, tuple[int, int, int]] = field(default_factory=dict)

    def note(self, cache: PolicyCache, going: list[bool]) -> None:
        """Count after a step."""
        for layer in cache.policy_layers:
            for seen, held, active in zip(layer.ledger.seen, layer.ledger.held, going, strict=True):
                if active:
                    self._add(seen, 1, held, held)

    def _add(self, seen: int, count: int, total: int, peak: int) -> None:
        old = self.by_seen.get(seen, (0, 0, 0))
        self.by_seen[seen] = (old[0] + count, old[1] + total, max(old[2], peak))

    def as_payload(self) -> list[list[int]]:
        """Return [seen, count, sum, largest] rows."""
        return [[seen, *entry] for seen, entry in sorted(self.by_seen.items())]

    def join(self, payload: list[list[int]]) -> None:
        """Add the counts of a batch."""
        for seen, count, total, peak in payload:
            self._add(seen, count, total, peak)

    def report(self, result: TaskResult) -> None:
        """Add the realised budget and its curve; nothing if no step was taken."""
        entries = sorted(self.by_seen.items())
        number = sum(count for _, (count, _, _) in entries)
        if not number:
            return
        share = math.fsum(total / seen for seen, (_, total, _) in entries) / number
        plain = {"low": None, "high": None, "n": number, "method": "counted at every step, layer and row"}
        result.measurements |= {
            "realised_budget_fraction": {"value": share, "unit": "", **plain},
            "entries_mean": {"value": sum(total for _, (_, total, _) in entries) / number, "unit": "entries", **plain},
            "entries_peak": {"value": max(peak for _, (_, _, peak) in entries), "unit": "entries", **plain},
        }
        result.curves["entries"] = [[seen, total / count, peak] for seen, (count, total, peak) in entries]
