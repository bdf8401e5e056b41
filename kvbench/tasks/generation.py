"""Answers under the policy, greedy or drawn, to one question or turn by turn, compared with the full cache's.

A row says what was answered, how like the full cache's answer and the reference it is (`answer_fields`), and where the
first different token stands, so that a reader sees the very token and not a word near it. What the cache really held at
every step becomes the realised budget.

A drawn token is the largest of logits / temperature + Gumbel noise, which is a draw from their softmax (Gumbel 1954;
Maddison et al. 2014, arXiv 1411.0030). The noise is made on the CPU, for each sequence from a generator of its own,
whose seed is the data set's item, the number of the draw and the task's seed: so it is the same alone and in a batch,
in both engines and on every device, and one draw has the same noise under every policy. Policy and full cache then
part only where their distributions do, as greedy answers do.

A conversation lies in one compressed cache: every turn adds to what the policy left of those before. The prompt is
prefilled and answered; then the next question follows as a chunk into the same cache, and so on. Each conversation runs
alone: its turns end at its own times, and a cache has one clock.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from kvbench.cache.policy import PART
from kvbench.datasets.base import Dataset, Example, Turn
from kvbench.errors import ConfigError, MeasureError, NonFiniteError, check_within
from kvbench.measures import MAX_TURNS, MEASURES
from kvbench.models.chat import next_turn_tokens
from kvbench.models.inputs import PromptBatch, answer_text, num_question_tokens, prompt_batch, reference_text
from kvbench.models.loader import LoadedModel
from kvbench.tasks.decode import CacheSetting, Decoding, greedy
from kvbench.tasks.rouge import fact_scores, first_divergence, length_ratio, rouge_l_released, rouge_scores
from kvbench.tasks.task import Answers, BatchTask, Bench, FullAnswers, Part, Payload, TaskResult, check_complete, joined

if TYPE_CHECKING:
    from kvbench.cache import PolicyCache


@dataclass(frozen=True, kw_only=True)
class Answering:
    """One way to make an answer. temperature None: greedily. draw: which of several draws it is, from 0.

    natural_stop False: nothing ends an answer before `max_new_tokens`, and an end token is one like any other.
    """

    max_new_tokens: int
    natural_stop: bool = True
    temperature: float | None = None
    seed: int = 0
    draw: int = 0

    def numbered(self, draw: int) -> Answering:
        """Return the way of another draw."""
        return replace(self, draw=draw)

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the answers beside their length, as stored ones are called by; nothing for greedy ones."""
        stop = {} if self.natural_stop else {"natural_stop": False}
        drawn = {"temperature": self.temperature, "seed": self.seed, "draw": self.draw}
        return stop | ({} if self.temperature is None else drawn)

    def sampler(self, names: Sequence[str]) -> Sampler | None:
        """Return what chooses the tokens of the items called `names`, one a row; None where the likeliest is taken."""
        if self.temperature is None:
            return None
        seeds = [f"draw-v1/{self.seed}/{self.draw}/{name}" for name in names]
        return Sampler(temperature=self.temperature, seeds=seeds)


class Sampler:
    """Draws one token a row and call; what a row is given depends on its own seed and on how often it was asked."""

    def __init__(self, *, temperature: float, seeds: Sequence[str]) -> None:
        digests = [hashlib.sha256(seed.encode(errors="replace")).digest() for seed in seeds]
        self._generators = [torch.Generator().manual_seed(int.from_bytes(digest[:7], "big")) for digest in digests]
        self._temperature = temperature

    def __call__(self, logits: Tensor) -> Tensor:
        """Return the tokens (B,) int64 drawn from logits (B, V); a token of logit -inf never is."""
        size = logits.shape[-1]
        uniform = torch.stack([torch.rand(size, generator=one, dtype=torch.float64) for one in self._generators])
        noise = -(-uniform.to(logits.device).clamp_(min=_LEAST).log_()).log_()
        return (logits.double() / self._temperature + noise).argmax(dim=-1)


_LEAST = math.ulp(0.5)  # of the numbers that are drawn, 0 aside, which has no logarithm


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Said:
    """One answered turn: token ids without the end token; tokens seen after it and the share of entries held."""

    tokens: list[int]
    seen_tokens: int
    held_fraction: float


@dataclass(frozen=True, kw_only=True)
class MultiTurn:
    """Greedy answers to at most `max_turns` questions of an example, each up to `max_new_tokens`.

    The history of a turn is what was really answered before, by policy and full cache each its own. In
    every run the full cache holds the first conversation once more and must say the same. `engine=graph`
    captures the step anew for every turn, because a turn's question lays out new buffers.
    """

    protocol: ClassVar[str] = "one_cache_v2"  # v1 rendered later turns without the settings of the first
    needs_follow_ups: ClassVar[bool] = True
    hides_question: ClassVar[bool] = True
    is_timed: ClassVar[bool] = False

    max_new_tokens: int = 160
    max_turns: int = 4

    def __post_init__(self) -> None:
        check_within("task.conversation", self, max_new_tokens=(1, None), max_turns=(2, MAX_TURNS))

    def run(self, bench: Bench) -> TaskResult:
        """Hold every conversation and score turn by turn. Raises: MeasureError, NonFiniteError."""
        full = self._full_answers(bench)
        first = bench.examples[0]
        for number, said in enumerate(self.talk(bench, first, bench.full)):
            if said.tokens != full[_name(first, number)]:
                raise MeasureError(
                    f"the full cache does not repeat turn {number + 1} of {first.id}; delete results/full_answers "
                    "and run again"
                )
        result = TaskResult()
        for example in bench.examples:
            result.samples[example.id] = _row(bench, example, self.talk(bench, example, bench.setting), full)
            bench.advance(1 / len(bench.examples))
        rows = (result.samples[example.id] for example in bench.examples)
        result.measure_means(dict.fromkeys(name for row in rows for name in row if name in MEASURES), bench)
        return result

    def _full_answers(self, bench: Bench) -> Answers:
        """Return the full cache's turns, from the store or held now."""

        def compute() -> Answers:
            return {
                _name(example, number): said.tokens
                for example in bench.examples
                for number, said in enumerate(self.talk(bench, example, bench.full))
            }

        settings = {**bench.answers.settings, "conversation": self.protocol, "max_turns": self.max_turns}
        needed = {_name(example, 0): example.id for example in bench.examples}
        return FullAnswers(folder=bench.answers.folder, settings=settings).get(self.max_new_tokens, compute, needed)

    @torch.inference_mode()
    def talk(self, bench: Bench, example: Example, setting: CacheSetting) -> list[Said]:
        """Return the turns of one conversation, all in one cache."""
        loaded, batch = bench.loaded, _batch(bench, example)
        decoding = setting.decoding(loaded, batch, self.max_new_tokens)
        said: list[Said] = []
        unfed: list[int] = []
        for number in range(1, 2 + len(example.follow_ups[: self.max_turns - 1])):
            if number > 1:
                chunk = [*unfed, *next_turn_tokens(loaded, example, number)]
                decoding.extend(torch.tensor([chunk], device=loaded.device))
            answer, unfed = self._answer(decoding, loaded.end_token_ids, f"turn {number} of {example.id}")
            decoding.cache.check()
            held = decoding.cache.occupancy()
            share = held.entries_mean / held.seen_tokens
            said.append(Said(tokens=answer, seen_tokens=int(held.seen_tokens), held_fraction=share))
        return said

    def _answer(self, decoding: Decoding, ends: Collection[int], name: str) -> tuple[list[int], list[int]]:
        """Return the answer, and its tokens that the cache has not seen (the last one, if it was cut off)."""
        answer: list[int] = []
        while True:
            largest, token = decoding.logits[0].max(dim=-1)
            if not bool(largest.isfinite()):
                raise NonFiniteError(f"the logits of token {len(answer)} in {name} are not finite")
            if int(token) in ends:
                return answer, []
            answer.append(int(token))
            if len(answer) == self.max_new_tokens:
                return answer, answer[-1:]
            decoding.step(token[None])


def _batch(bench: Bench, example: Example) -> PromptBatch:
    hidden = 0 if bench.query_visible else num_question_tokens(bench.loaded, example)
    return prompt_batch(bench.loaded, [example], num_question_tokens=hidden)


def _name(example: Example, number: int) -> str:
    return f"{example.id}#turn{number + 1}"


def _row(bench: Bench, example: Example, said: list[Said], full: Mapping[str, list[int]]) -> dict[str, Any]:
    """Return the fields of every turn, `turn1_text`, `turn1_rougeL_vs_full`, ..."""
    row: dict[str, Any] = {}
    asked = [Turn(question=example.question, answer=example.reference), *example.follow_ups]
    for number, (turn, one) in enumerate(zip(asked, said, strict=False)):
        theirs = full[_name(example, number)]
        fields = {"question": turn.question, **answer_fields(bench.loaded, one.tokens, theirs, turn.answer)}
        fields["realised_budget_fraction"] = one.held_fraction
        if turn.answer:
            fields["exact_fraction"] = float(says_the_same(fields["text"], turn.answer))
        if number == 0:
            fields |= fact_fields(bench.dataset, example, fields["text"])
        row |= {f"turn{number + 1}_{name}": value for name, value in fields.items()}
    return row
