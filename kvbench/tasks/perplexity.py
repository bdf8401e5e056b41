"""Perplexity of the reference answers, teacher-forced through the policy's own decode.

Perplexity by the loop of Elastic Cache's code, every departure from `perplexity` an option.
"""

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
from kvbench.models.inputs import answer_tokens
from kvbench.models.loader import LoadedModel
from kvbench.stats.intervals import pooled_ratio_interval
from kvbench.tasks.decode import padded_targets
from kvbench.tasks.prompts import Part
from kvbench.tasks.task import BatchTask, Bench, Payload, TaskResult


@dataclass(frozen=True, kw_only=True)
class Perplexity(BatchTask):
    """Every answer token and the end token is scored, one at a time, after the cache was cut.

    ppl = exp(sum of negative log-likelihoods / number of tokens), float32 log-softmax; the first
    token's distribution is the prompt's, before any cut, and counts. Per-sample sums are stored.
    """

    protocol: ClassVar[str] = "teacher_forced_v2"
    needs_reference: ClassVar[bool] = True
    hides_question: ClassVar[bool] = True

    @torch.inference_mode()
    def measure(self, bench: Bench, part: Part) -> Payload:
        """Score one batch. Raises: NonFiniteError when a likelihood is not finite."""
        answers = [answer_tokens(bench.loaded, example) for example in part.examples]
        targets, real = padded_targets(answers, bench.loaded.eos_token_id, bench.loaded.device)
        decoding = part.decoding(bench.setting, targets.shape[1])
        nlls = [_nll(decoding.logits, targets[:, 0])]
        for number in range(1, targets.shape[1]):
            decoding.step(targets[:, number - 1])
            nlls.append(_nll(decoding.logits, targets[:, number]))
        rows = _rows(torch.stack(nlls, dim=1), real, part.examples)
        decoding.cache.check()
        return {example.id: row for example, row in zip(part.examples, rows, strict=True)}

    def summarise(self, bench: Bench, payloads: Sequence[Payload]) -> TaskResult:
        """Pool the tokens of all examples."""
        result = TaskResult()
        for payload in payloads:
            result.samples |= payload
        rows = [result.samples[example.id] for example in bench.examples]
        interval = pooled_ratio_interval(
            [row["nll_sum"] for row in rows], [row["num_scored_tokens"] for row in rows], bench.clusters, math.exp
        )
        result.measure("ppl", interval)
        return result


def _nll(logits: Tensor, target: Tensor) -> Tensor:
    return -logits.log_softmax(dim=-1).gather(-1, target[:, None])[:, 0]


def _rows(nll: Tensor, real: Tensor, examples: Sequence[Example]) -> list[dict[str, float]]:
    nll = nll.masked_fill(~real, 0.0)
    if not bool(torch.isfinite(nll).all()):
        row, token = torch.nonzero(~torch.isfinite(nll))[0].tolist()
        raise NonFiniteError(f"the likelihood of token {token} of {examples[row].id} is not finite")
    sums: list[float] = nll.double().sum(dim=-1).tolist()
    return [
        {"nll_sum": total, "nll_first_token": first, "num_scored_tokens": count}
        for total, first, count in zip(sums, nll[:, 0].tolist(), real.sum(dim=-1).tolist(), strict=True)
    ]


@dataclass(frozen=True, kw_only=True)
class PerplexityReleased(BatchTask):
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

    protocol: ClassVar[str] = "elastic_release_v2"
    needs_reference: ClassVar[bool] = True
    hides_question: ClassVar[bool] = True

    first_id_cut: bool = True
    ends_left_out: bool = True
    model_precision: bool = True

    @torch.inference_mode()
    def measure(self, bench: Bench, part: Part) -> Payload:
        """Score one batch. Raises: NonFiniteError when a likelihood is not finite."""
        answers = [self._scored_tokens(bench.loaded, example) for example in part.examples]
        if not any(answers):
            return {example.id: {"released_nll_sum": 0.0, "released_num_scored_tokens": 0} for example in part.examples}
        targets, real = padded_targets(answers, bench.loaded.eos_token_id, bench.loaded.device)
        decoding = part.decoding(bench.setting, targets.shape[1])
        nlls = [self._nll(bench, decoding.logits, targets[:, 0])]
        for number in range(1, targets.shape[1]):
            decoding.step(targets[:, number - 1])
            nlls.append(self._nll(bench, decoding.logits, targets[:, number]))
        rows = _perplexity_released_rows(torch.stack(nlls, dim=1), real, part.examples)
        decoding.cache.check()
        return rows

    def summarise(self, bench: Bench, payloads: Sequence[Payload]) -> TaskResult:
        """Pool the tokens of all answers. Raises: DataError if nothing is scored."""
        result = TaskResult()
        for payload in payloads:
            result.samples |= payload
        clusters = {example.id: example.cluster for example in bench.examples}
        rows = {name: row for name, row in result.samples.items() if row["released_num_scored_tokens"] > 0}
        if not rows:
            raise DataError("no answer has a token that the released loop scores; it leaves the last one out")
        sums = [row["released_nll_sum"] for row in rows.values()]
        counts = [row["released_num_scored_tokens"] for row in rows.values()]
        interval = pooled_ratio_interval(sums, counts, [clusters[name] for name in rows], math.exp)
        if self.model_precision:
            mean = torch.tensor(sum(sums) / sum(counts)).to(bench.loaded.model.dtype)
            interval = replace(interval, value=mean.exp().item())
        result.measure("ppl_released", interval)
        return result

    def _scored_tokens(self, loaded: LoadedModel, example: Example) -> list[int]:
        tokens = answer_tokens(loaded, example)[:-1]
        if self.first_id_cut:
            tokens = loaded.text.ids(loaded.text.shield(example.reference), add_special_tokens=True)[1:]
        return tokens[:-1] if self.ends_left_out else [*tokens, loaded.eos_token_id]

    def _nll(self, bench: Bench, logits: Tensor, target: Tensor) -> Tensor:
        dtype = bench.loaded.model.dtype if self.model_precision else torch.float32
        return functional.cross_entropy(logits.to(dtype), target, reduction="none")


def _perplexity_released_rows(nll: Tensor, real: Tensor, examples: Sequence[Example]) -> dict[str, dict[str, float]]:
    if not bool(torch.isfinite(nll[real]).all()):
        row, token = torch.nonzero(~torch.isfinite(nll) & real)[0].tolist()
        raise NonFiniteError(f"the likelihood of token {token} of {examples[row].id} is not finite")
    sums: list[float] = nll.double().masked_fill(~real, 0.0).sum(dim=-1).tolist()
    counts: list[int] = real.sum(dim=-1).tolist()
    return {
        example.id: {"released_nll_sum": total, "released_num_scored_tokens": count}
        for example, total, count in zip(examples, sums, counts, strict=True)
    }
