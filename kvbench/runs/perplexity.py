"""Perplexity of the reference answers, teacher-forced through the policy's own decode."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvbench.datasets.base import Example
from kvbench.errors import NonFiniteError
from kvbench.models.inputs import answer_tokens
from kvbench.runs.batch_task import BatchTask, Payload
from kvbench.runs.loop import padded_targets
from kvbench.runs.prompts import Part
from kvbench.runs.task import Bench, TaskResult
from kvbench.stats.intervals import pooled_ratio_interval


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
