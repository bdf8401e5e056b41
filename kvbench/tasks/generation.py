"""Answers under the policy, greedy or drawn, compared with the full cache's and with the reference.

A row says what was answered, how like the full cache's answer and the reference it is (`answer_fields`), and where the
first different token stands, so that a reader sees the very token and not a word near it. What the cache really held at
every step becomes the realised budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from kvbench.cache.policy import PART
from kvbench.datasets.base import Dataset, Example
from kvbench.errors import ConfigError, MeasureError, check_within
from kvbench.models.inputs import answer_text, reference_text
from kvbench.models.loader import LoadedModel
from kvbench.tasks.decode import CacheSetting, greedy
from kvbench.tasks.rouge import fact_scores, first_divergence, length_ratio, rouge_l_released, rouge_scores
from kvbench.tasks.sampling import Answering
from kvbench.tasks.task import (
    Answers,
    BatchTask,
    Bench,
    FullAnswers,
    Part,
    Payload,
    TaskResult,
    check_complete,
    joined,
)

if TYPE_CHECKING:
    from kvbench.cache import PolicyCache


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


def answer_fields(loaded: LoadedModel, tokens: Sequence[int], full: Sequence[int], reference: str) -> dict[str, Any]:
    """Return what a row says of one answer: both texts, ROUGE against full and reference, length, first difference."""
    text, full_text = answer_text(loaded, tokens), answer_text(loaded, full)
    fields: dict[str, Any] = {"text": text, "full_text": full_text, "reference": reference}
    for name, other in (("full", full_text), ("reference", reference)):
        if other or name == "full":  # an empty reference is none
            scores = rouge_scores(prediction=text, reference=other)
            fields |= {f"{kind}_vs_{name}": score for kind, score in scores.items()}
    fields["length_ratio"] = length_ratio(len(tokens), len(full))
    return fields | divergence(loaded, tokens, full)


def fact_fields(dataset: Dataset, example: Example, text: str) -> dict[str, float]:
    """Return which facts of `example` the answer states, or whether it is the one right answer, where that is known."""
    if example.one_answer:
        right = example.is_right(text) if example.is_right is not None else says_the_same(text, example.reference)
        return {"answers_right_fraction": float(right)}
    if example.facts is None:
        return {}
    return fact_scores(stated=dataset.facts_in(text), true=example.facts, noun=example.fact_noun)


def says_the_same(text: str, other: str) -> bool:
    """Tell whether the texts are equal but for case, white space and a final full stop."""
    return _plain(text) == _plain(other)


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".")


_UNITS = {"first_divergence_tokens": "tokens"}
_DESCRIPTIVE = ("text", "full_text", "reference", "num_new_tokens", "draws", *PLACES)


@dataclass(frozen=True, kw_only=True)
class Generation(BatchTask):
    """Answers of up to `max_new_tokens`, scored per example; greedy where no temperature is given, None or 0.

    With a temperature each example is answered `num_samples` times, from `seed`; a row then has the mean of each score
    over the draws, so that the mean over examples is avg@k and its interval is over examples, and every draw's text.
    natural_stop: false has every answer go on to `max_new_tokens`. In every run the full cache must give its answers
    to the first batch again, token for token. `released_rouge` adds the ROUGE-L of Elastic Cache's code
    (kvbench.tasks.rouge).
    """

    protocol: ClassVar[str] = "greedy_v2"
    generates: ClassVar[bool] = True
    hides_question: ClassVar[bool] = True

    max_new_tokens: int = 160
    released_rouge: bool = False
    natural_stop: bool = field(default=True, metadata=PART)
    temperature: float | None = field(default=None, metadata=PART)
    num_samples: int = field(default=1, metadata=PART)
    seed: int = field(default=0, metadata=PART)

    def __post_init__(self) -> None:
        check_within("task.generation", self, max_new_tokens=(1, None), num_samples=(1, None))
        if not (self.temperature or 0.0) >= 0.0:
            raise ConfigError(
                f"task.generation.temperature is {self.temperature}; it must be above 0, or null for greedy answers"
            )
        if self.temperature == 0.0:  # the same as none, in the cell's key too
            object.__setattr__(self, "temperature", None)
        if self.temperature is None and (self.num_samples, self.seed) != (1, 0):
            raise ConfigError(
                f"task.generation has num_samples={self.num_samples}, seed={self.seed} and no temperature, so that all "
                "draws would be the one greedy answer; give task.generation.temperature, or leave them out"
            )

    def measure(self, bench: Bench, part: Part) -> Payload:
        """Answer one batch, compare, and note how many entries were really held at every step."""
        held, draws = HeldEntries(), []
        for number in range(self.num_samples):
            how = self._answering.numbered(number)
            full = full_answers(bench, part, how)
            if number == 0:
                bench.prompts.once(("reproduces", how), partial(_check_reproduces, bench, part, full, how))
            answers = _answer(bench, part, bench.setting, how, held.note)
            draws.append(
                [
                    self._row(bench, example, answer, full[example.id])
                    for example, answer in zip(part.examples, answers, strict=True)
                ]
            )
        rows = {
            example.id: rows[0] if self.temperature is None else _over_draws(rows)
            for example, *rows in zip(part.examples, *draws, strict=True)
        }
        return {"rows": rows, "held": held.as_payload()}

    @property
    def _answering(self) -> Answering:
        names = ("max_new_tokens", "natural_stop", "temperature", "seed")
        return Answering(**{name: getattr(self, name) for name in names})

    def _row(self, bench: Bench, example: Example, answer: list[int], full: list[int]) -> dict[str, Any]:
        row = answer_fields(bench.loaded, answer, full, reference_text(bench.loaded, example))
        row |= {"num_new_tokens": len(answer)} | fact_fields(bench.dataset, example, row["text"])
        if self.released_rouge:
            text, full_text = (self._with_end(bench.loaded, tokens) for tokens in (answer, full))
            row["rougeL_released_vs_full"] = rouge_l_released(prediction=text, reference=full_text)
        return row

    def _with_end(self, loaded: LoadedModel, tokens: list[int]) -> str:
        """Return the text that Elastic Cache's code compares: special tokens are left in, the end token too."""
        ended = [*tokens, loaded.eos_token_id] if len(tokens) < self.max_new_tokens else tokens
        text: str = loaded.tokenizer.decode(ended)
        return text.strip()

    def summarise(self, bench: Bench, payloads: Sequence[Payload]) -> TaskResult:
        """Average over examples."""
        result, held = TaskResult(samples=joined(payload["rows"] for payload in payloads)), HeldEntries()
        for payload in payloads:
            held.join(payload["held"])
        rows = (result.samples[example.id] for example in bench.examples)
        names = dict.fromkeys(name for row in rows for name in row if name not in _DESCRIPTIVE)
        result.measure_means(names, bench, _UNITS)
        held.report(result)
        return result


def _over_draws(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return one row of several draws: the first one's texts and length, each score's mean over those that have it.

    `draws` holds each with its own texts and scores, so that the means can be checked.
    """
    names = dict.fromkeys(name for row in rows for name in row if name not in _DESCRIPTIVE)
    means = {name: _mean(row.get(name) for row in rows) for name in names}
    apart = ("reference", *PLACES)
    draws = [{name: value for name, value in row.items() if name not in apart} for row in rows]
    return dict(rows[0]) | means | {"draws": draws}


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def _answer(
    bench: Bench,
    part: Part,
    setting: CacheSetting,
    how: Answering,
    on_step: Callable[[PolicyCache, list[bool]], None] | None = None,
) -> list[list[int]]:
    return greedy(
        part.decoding(setting, how.max_new_tokens),
        end_token_ids=bench.loaded.end_token_ids if how.natural_stop else (),
        max_new_tokens=how.max_new_tokens,
        choose=how.sampler([example.id for example in part.examples]),
        on_step=on_step,
    )


def full_answers(bench: Bench, part: Part, how: Answering) -> Answers:
    """Return the full cache's answers to `part`, and to what else is known, by example id: stored, or given now.

    They are given batch by batch, after the prompt that the cells share, and stored when the last batch is answered.
    """
    answers: Answers = bench.prompts.once(("full answers", how), lambda: _stored_answers(bench, how))
    if all(example.id in answers for example in part.examples):
        return answers
    answers |= _answered(bench, part, how)
    if part.number == len(bench.prompts) - 1:
        again = bench.own_prompts()  # for batches that were measured before a kill, whose answers went with it
        for other in range(len(again) - 1):
            if any(name not in answers for name in again.ids_of(other)):
                answers |= _answered(bench, again.part(other), how)
        _store(bench, how).write(how.max_new_tokens, answers)
    return answers


def _store(bench: Bench, how: Answering) -> FullAnswers:
    return replace(bench.answers, settings={**bench.answers.settings, **how.settings})


def _stored_answers(bench: Bench, how: Answering) -> Answers:
    stored = _store(bench, how).read(how.max_new_tokens)
    if stored is not None:
        check_complete(stored, {example.id: example.id for example in bench.examples})
    return stored or {}


def _answered(bench: Bench, part: Part, how: Answering) -> Answers:
    texts = _answer(bench, part, bench.full, how)
    return {example.id: text for example, text in zip(part.examples, texts, strict=True)}


def _check_reproduces(bench: Bench, part: Part, full: Answers, how: Answering) -> None:
    again = _answer(bench, part, bench.full, how)
    for example, answer in zip(part.examples, again, strict=True):
        if answer != full[example.id]:
            raise MeasureError(
                f"the full cache does not reproduce its stored answer to {example.id} (first difference at token "
                f"{first_divergence(answer, full[example.id])}); delete results/full_answers and run again"
            )


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
        method = "counted at every step, layer and row"
        share = math.fsum(total / seen for seen, (_, total, _) in entries) / number
        mean = sum(total for _, (_, total, _) in entries) / number
        result.note("realised_budget_fraction", share, n=number, method=method)
        result.note("entries_mean", mean, "entries", n=number, method=method)
        result.note("entries_peak", max(peak for _, (_, _, peak) in entries), "entries", n=number, method=method)
        result.curves["entries"] = [[seen, total / count, peak] for seen, (count, total, peak) in entries]
