"""Greedy answers under the policy, compared with the full cache's and with the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from kvbench.cache import PolicyCache
from kvbench.datasets.base import Dataset, Example
from kvbench.errors import ConfigError, MeasureError
from kvbench.metrics.facts import fact_scores
from kvbench.metrics.intervals import mean_interval
from kvbench.metrics.rouge import first_divergence, length_ratio, rouge_scores
from kvbench.metrics.rouge_released import rouge_l_released
from kvbench.models.inputs import PromptBatch, answer_text
from kvbench.runs.full_answers import Answers
from kvbench.runs.loop import greedy
from kvbench.runs.task import Bench, TaskResult

_UNITS = {"first_divergence_tokens": "tokens"}
_DESCRIPTIVE = ("text", "full_text", "reference", "num_new_tokens")


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Greedy decoding up to `max_new_tokens`, scored per example.

    In every run the full cache answers the first planned batch once more and must give the stored
    answers token for token: a reference that does not reproduce is worth nothing. `released_rouge` adds
    rougeL_released_vs_full, on texts with their end token as in Elastic Cache's code.
    """

    protocol: ClassVar[str] = "greedy_v1"

    max_new_tokens: int = 160
    released_rouge: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"task.generation.max_new_tokens is {self.max_new_tokens}; it must be at least 1")

    def run(self, bench: Bench) -> TaskResult:
        """Generate, compare, and note how many entries were really held at every step."""
        batches = bench.batches()
        full = full_answers(bench, batches, self.max_new_tokens)
        examples, batch = batches[0]
        _check_reproduces(bench, examples, batch, full, self.max_new_tokens)
        held = HeldEntries()
        result = TaskResult()
        for examples, batch in batches:
            answers = greedy(bench.loaded, batch, bench.setting, max_new_tokens=self.max_new_tokens, on_step=held.note)
            for example, answer in zip(examples, answers, strict=True):
                result.samples[example.id] = self._row(bench, example, answer, full[example.id])
            bench.advance(len(examples) / len(bench.examples))
        _summarise(bench, result)
        held.report(result)
        return result

    def _row(self, bench: Bench, example: Example, answer: list[int], full: list[int]) -> dict[str, Any]:
        row = _row(bench, example, answer, full)
        if self.released_rouge:
            texts = [_text_with_end(bench, tokens, self.max_new_tokens) for tokens in (answer, full)]
            row["rougeL_released_vs_full"] = rouge_l_released(prediction=texts[0], reference=texts[1])
        return row


def full_answers(
    bench: Bench, batches: Sequence[tuple[Sequence[Example], PromptBatch]], max_new_tokens: int
) -> Answers:
    """Return the full cache's answers by example id, from the store or computed now."""

    def compute() -> Answers:
        answers: Answers = {}
        for examples, batch in batches:
            texts = greedy(bench.loaded, batch, bench.full, max_new_tokens=max_new_tokens)
            answers |= {example.id: text for example, text in zip(examples, texts, strict=True)}
        return answers

    answers = bench.answers.get(max_new_tokens, compute)
    missing = [example.id for example in bench.examples if example.id not in answers]
    if missing:
        raise MeasureError(f"the stored full answers lack {missing[0]}; delete results/full_answers and run again")
    return answers


def _check_reproduces(
    bench: Bench, examples: Sequence[Example], batch: PromptBatch, full: Answers, max_new_tokens: int
) -> None:
    again = greedy(bench.loaded, batch, bench.full, max_new_tokens=max_new_tokens)
    for example, answer in zip(examples, again, strict=True):
        if answer != full[example.id]:
            raise MeasureError(
                f"the full cache does not reproduce its stored answer to {example.id} (first difference at token "
                f"{first_divergence(answer, full[example.id])}); delete results/full_answers and run again"
            )


def _row(bench: Bench, example: Example, answer: list[int], full: list[int]) -> dict[str, Any]:
    text, full_text = answer_text(bench.loaded, answer), answer_text(bench.loaded, full)
    vs_full = rouge_scores(prediction=text, reference=full_text)
    vs_reference = rouge_scores(prediction=text, reference=example.reference)
    row: dict[str, Any] = {"text": text, "full_text": full_text, "reference": example.reference}
    row |= {f"{name}_vs_full": score for name, score in vs_full.items()}
    row |= {f"{name}_vs_reference": score for name, score in vs_reference.items()}
    row["length_ratio"] = length_ratio(len(answer), len(full))
    row["first_divergence_tokens"] = first_divergence(answer, full)
    row["num_new_tokens"] = len(answer)
    return row | _facts(bench.dataset, example, text)


def _text_with_end(bench: Bench, tokens: list[int], max_new_tokens: int) -> str:
    """Return the answer with the end token it was ended by, if it was."""
    ended = [*tokens, bench.loaded.eos_token_id] if len(tokens) < max_new_tokens else tokens
    text: str = bench.loaded.tokenizer.decode(ended)
    return text.strip()


def _facts(dataset: Dataset, example: Example, text: str) -> dict[str, float]:
    return {} if example.facts is None else fact_scores(stated=dataset.facts_in(text), true=example.facts)


def _summarise(bench: Bench, result: TaskResult) -> None:
    rows = [result.samples[example.id] for example in bench.examples]
    for name in (key for key in rows[0] if key not in _DESCRIPTIVE):
        scored = [(row[name], c) for row, c in zip(rows, bench.clusters, strict=True) if row[name] is not None]
        interval = mean_interval([value for value, _ in scored], [cluster for _, cluster in scored])
        result.measure(name, interval, _UNITS.get(name, ""))


@dataclass(kw_only=True)
class HeldEntries:
    """Entries held at each step, over layers and rows still being answered; host counts only."""

    by_seen: dict[int, list[int]] = field(default_factory=dict)

    def note(self, cache: PolicyCache, going: list[bool]) -> None:
        """Count after a step."""
        for layer in cache.policy_layers:
            for seen, held, active in zip(layer.ledger.seen, layer.ledger.held, going, strict=True):
                if active:
                    self.by_seen.setdefault(seen, []).append(held)

    def report(self, result: TaskResult) -> None:
        """Add the realised budget and its curve; nothing if no step was taken."""
        counts = [held for entries in self.by_seen.values() for held in entries]
        if not counts:
            return
        shares = [held / seen for seen, entries in self.by_seen.items() for held in entries]
        plain = {"low": None, "high": None, "n": len(counts), "method": "counted at every step, layer and row"}
        result.measurements |= {
            "realised_budget_fraction": {"value": sum(shares) / len(shares), "unit": "", **plain},
            "entries_mean": {"value": sum(counts) / len(counts), "unit": "entries", **plain},
            "entries_peak": {"value": max(counts), "unit": "entries", **plain},
        }
        result.curves["entries"] = [
            [seen, sum(entries) / len(entries), max(entries)] for seen, entries in sorted(self.by_seen.items())
        ]
