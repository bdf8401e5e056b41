"""Perplexity of the reference answers, teacher-forced through the policy's own decode.

Where nothing is freed between two tokens an answer is fed in chunks, which is the same text over the same entries with
other rounding; a row says how (`nll_tokens_per_pass`, 1: step by step).

`Perplexity` is the number to compare by. `PerplexityReleased` is the loop of Elastic Cache's code, every departure from
the former an option.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from kvbench.datasets.base import Example
from kvbench.errors import DataError, NonFiniteError
from kvbench.models.inputs import answer_tokens
from kvbench.models.loader import LoadedModel
from kvbench.tasks.decode import forced, padded_targets
from kvbench.tasks.task import BatchTask, Bench, Part, Payload, TaskResult, joined


@dataclass(frozen=True, kw_only=True)
class Perplexity(BatchTask):
    """Every answer token and the end token is scored, each over what the cache then held, after it was cut.

    ppl = exp(sum of negative log-likelihoods / number of tokens), float32 log-softmax; the first
    token's distribution is the prompt's, before any cut, and counts. Per-sample sums are stored.
    """

    protocol: ClassVar[str] = "teacher_forced_v2"
    needs_reference: ClassVar[bool] = True
    hides_question: ClassVar[bool] = True
    knows_tokens: ClassVar[bool] = True

    def measure(self, bench: Bench, part: Part) -> Payload:
        """Score one batch. Raises: NonFiniteError when a likelihood is not finite."""
        answers = [answer_tokens(bench.loaded, example) for example in part.examples]
        nll, per_pass = _scored(
            bench, part, answers, lambda logits, target: -logits.log_softmax(-1).gather(-1, target[:, None])[:, 0]
        )
        sums = (nll.double().sum(dim=-1).tolist(), nll[:, 0].tolist(), map(len, answers))
        return {
            example.id: {
                "nll_sum": total,
                "nll_first_token": first,
                "num_scored_tokens": count,
                "nll_tokens_per_pass": per_pass,
            }
            for example, total, first, count in zip(part.examples, *sums, strict=True)
        }

    def summarise(self, bench: Bench, payloads: Sequence[Payload]) -> TaskResult:
        """Pool the tokens of all examples."""
        result = TaskResult(samples=joined(payloads))
        result.measure("ppl", result.pooled("nll_sum", "num_scored_tokens", bench.examples, math.exp))
        return result


@torch.inference_mode()
def _scored(
    bench: Bench, part: Part, answers: list[list[int]], nll: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, int]:
    """Return `nll` of each token of `answers`, (B, N), 0 after a row's end, and how many were fed together at most.

    nll takes logits (B, V) and tokens (B,). Raises: NonFiniteError where one is not finite.
    """
    targets, real = padded_targets(answers, bench.loaded.eos_token_id, bench.loaded.device)
    fed, lengths = targets[:, :-1], [len(answer) - 1 for answer in answers]
    decoding = part.decoding(bench.setting, targets.shape[1], told=(fed, lengths))
    after = forced(decoding, fed, lengths)
    logits = chain([decoding.logits], after)
    nlls = torch.stack([nll(one, target) for one, target in zip(logits, targets.T, strict=True)], dim=1)
    nlls = nlls.masked_fill(~real, 0.0)
    if not bool(nlls.isfinite().all()):
        row, token = torch.nonzero(~nlls.isfinite())[0].tolist()
        raise NonFiniteError(f"the likelihood of token {token} of {part.examples[row].id} is not finite")
    decoding.cache.check()
    return nlls, max(1, min(decoding.tokens_per_pass, targets.shape[1] - 1))


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
    knows_tokens: ClassVar[bool] = True

    first_id_cut: bool = True
    ends_left_out: bool = True
    model_precision: bool = True

    def measure(self, bench: Bench, part: Part) -> Payload:
        """Score one batch. Raises: NonFiniteError when a likelihood is not finite."""
        answers = [self._scored_tokens(bench.loaded, example) for example in part.examples]
        dtype = bench.loaded.model.dtype if self.model_precision else torch.float32

        def nll(logits: Tensor, target: Tensor) -> Tensor:
            return functional.cross_entropy(logits.to(dtype), target, reduction="none")

        sums, per_pass = [0.0] * len(answers), 1
        if any(answers):
            nlls, per_pass = _scored(bench, part, answers, nll)
            sums = nlls.double().sum(dim=-1).tolist()
        return {
            example.id: {
                "released_nll_sum": total,
                "released_num_scored_tokens": len(answer),
                "released_tokens_per_pass": per_pass,
            }
            for example, total, answer in zip(part.examples, sums, answers, strict=True)
        }

    def summarise(self, bench: Bench, payloads: Sequence[Payload]) -> TaskResult:
        """Pool the tokens of all answers. Raises: DataError if nothing is scored."""
        result = TaskResult(samples=joined(payloads))
        examples = {example.id: example for example in bench.examples}
        rows = {name: row for name, row in result.samples.items() if row["released_num_scored_tokens"] > 0}
        if not rows:
            raise DataError("no answer has a token that the released loop scores; it leaves the last one out")
        names = ("released_nll_sum", "released_num_scored_tokens")
        interval = result.pooled(*names, [examples[name] for name in rows], math.exp)
        if self.model_precision:
            total, count = (sum(row[name] for row in rows.values()) for name in names)
            interval = replace(interval, value=torch.tensor(total / count).to(bench.loaded.model.dtype).exp().item())
        result.measure("ppl_released", interval)
        return result

    def _scored_tokens(self, loaded: LoadedModel, example: Example) -> list[int]:
        tokens = answer_tokens(loaded, example)[:-1]
        if self.first_id_cut:
            tokens = loaded.text.ids(loaded.text.shield(example.reference), add_special_tokens=True)[1:]
        return tokens[:-1] if self.ends_left_out else [*tokens, loaded.eos_token_id]
