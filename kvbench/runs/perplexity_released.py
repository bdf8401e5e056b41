"""Perplexity by the loop of Elastic Cache's code, every departure from `perplexity` an option."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from kvbench.datasets.base import Example
from kvbench.errors import DataError, NonFiniteError
from kvbench.metrics.intervals import pooled_ratio_interval
from kvbench.models.inputs import PromptBatch, answer_tokens
from kvbench.models.loader import LoadedModel
from kvbench.runs.loop import Decoding, padded_targets
from kvbench.runs.task import Bench, TaskResult


@dataclass(frozen=True, kw_only=True)
class PerplexityReleased:
    """`ppl_released`: the loop of eval_ppl.py and eval_ppl_qwen.py (github.com/liuzuyan/ElasticCache at 3138e03).

    As there, the first token is scored before any eviction, and tokens of all answers are pooled. With
    every option False the number is `ppl`.

    first_id_cut: the answer is tokenized alone and its first id cut off. That is the begin token where a
        tokenizer writes one; where none is written (Qwen), the first real token is gone and the second
        stands in its place.
    ends_left_out: neither the last token of an answer nor the end token is scored. Answers of fewer
        than two tokens then count nothing.
    model_precision: likelihoods, their mean and the exponential are rounded to the model's dtype; in
        bfloat16 a step is about 0.8 % of the result. The interval is made from unrounded sums.

    Left out: the attention mask of the Qwen script, which is 0 for the token of id 0.
    """

    protocol: ClassVar[str] = "elastic_release_v1"

    first_id_cut: bool = True
    ends_left_out: bool = True
    model_precision: bool = True

    def run(self, bench: Bench) -> TaskResult:
        """Score all examples. Raises: NonFiniteError for a likelihood, DataError if nothing is scored."""
        result, scored = TaskResult(), []
        for examples, batch in bench.batches():
            answers = [self._scored_tokens(bench.loaded, example) for example in examples]
            if any(answers):
                nll, real = self._score(bench, answers, batch, examples)
                scored.append(nll[real])
                result.samples |= _rows(nll, real, examples)
            bench.advance(len(examples) / len(bench.examples))
        if not scored:
            raise DataError("no answer has a token that the released loop scores; it leaves the last one out")
        self._measure(bench, result, torch.cat(scored))
        return result

    def _scored_tokens(self, loaded: LoadedModel, example: Example) -> list[int]:
        tokens = answer_tokens(loaded, example)[:-1]
        if self.first_id_cut:
            alone: list[int] = loaded.tokenizer(example.reference)["input_ids"]
            tokens = alone[1:]
        return tokens[:-1] if self.ends_left_out else [*tokens, loaded.eos_token_id]

    @torch.inference_mode()
    def _score(
        self, bench: Bench, answers: list[list[int]], batch: PromptBatch, examples: Sequence[Example]
    ) -> tuple[Tensor, Tensor]:
        targets, real = padded_targets(answers, bench.loaded.eos_token_id, bench.loaded.device)
        decoding = Decoding(bench.loaded, batch, bench.setting.cache(bench.loaded, batch, targets.shape[1]))
        nlls = [self._nll(bench, decoding.logits, targets[:, 0])]
        for number in range(1, targets.shape[1]):
            decoding.step(targets[:, number - 1])
            nlls.append(self._nll(bench, decoding.logits, targets[:, number]))
        nll = torch.stack(nlls, dim=1)
        if not bool(torch.isfinite(nll[real]).all()):
            row, token = torch.nonzero(~torch.isfinite(nll) & real)[0].tolist()
            raise NonFiniteError(f"the likelihood of token {token} of {examples[row].id} is not finite")
        return nll, real

    def _nll(self, bench: Bench, logits: Tensor, target: Tensor) -> Tensor:
        dtype = bench.loaded.model.dtype if self.model_precision else torch.float32
        return functional.cross_entropy(logits.to(dtype), target, reduction="none")

    def _measure(self, bench: Bench, result: TaskResult, nll: Tensor) -> None:
        clusters = {example.id: example.cluster for example in bench.examples}
        rows = [(name, row) for name, row in result.samples.items() if row["released_num_scored_tokens"] > 0]
        interval = pooled_ratio_interval(
            [row["released_nll_sum"] for _, row in rows],
            [row["released_num_scored_tokens"] for _, row in rows],
            [clusters[name] for name, _ in rows],
            math.exp,
        )
        if self.model_precision:
            interval = replace(interval, value=nll.mean().exp().item())
        result.measure("ppl_released", interval)


def _rows(nll: Tensor, real: Tensor, examples: Sequence[Example]) -> dict[str, dict[str, float]]:
    sums: list[float] = nll.double().masked_fill(~real, 0.0).sum(dim=-1).tolist()
    counts: list[int] = real.sum(dim=-1).tolist()
    return {
        example.id: {"released_nll_sum": total, "released_num_scored_tokens": count}
        for example, total, count in zip(examples, sums, counts, strict=True)
    }
