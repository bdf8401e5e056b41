"""A conversation in one compressed cache: every turn adds to what the policy left of those before.

The prompt is prefilled and answered; then the next question follows as a chunk into the same cache, and
so on. Each conversation runs alone: its turns end at its own times, and a cache has one clock.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from kvbench.datasets.base import Example, Turn
from kvbench.errors import MeasureError, NonFiniteError, check_within
from kvbench.measures import MAX_TURNS, MEASURES
from kvbench.models.chat import next_turn_tokens
from kvbench.models.inputs import PromptBatch, num_question_tokens, prompt_batch
from kvbench.tasks.decode import CacheSetting, Decoding
from kvbench.tasks.generation import answer_fields, fact_fields, says_the_same
from kvbench.tasks.task import Answers, Bench, FullAnswers, TaskResult


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
