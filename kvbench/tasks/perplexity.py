"""How one text is told through the policy's own decode: its perplexity, and how far each step is from the full cache's.

Where nothing is freed between two tokens an answer is fed in chunks, which is the same text over the same entries with
other rounding; a row says how (`nll_tokens_per_pass`, 1: step by step).

`Perplexity` is the number to compare by. `PerplexityReleased` is the loop of Elastic Cache's code, every departure from
the former an option.

`Fidelity` says how far the policy's next-token distribution is from the full cache's. Both caches are fed the full
cache's own greedy answer, or the data set's text, so every step compares two distributions over the same history. Both
are fed alike, in chunks where the policy frees nothing between two tokens, else one by one, so that no rounding of one
way is taken for a difference (`kl_tokens_per_pass`, 1: one by one).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from kvbench.cache.policy import PART
from kvbench.datasets.base import Example
from kvbench.errors import ConfigError, DataError, MeasureError, NonFiniteError, check_known
from kvbench.measures import score_scale
from kvbench.models.inputs import answer_tokens
from kvbench.models.loader import LoadedModel
from kvbench.tasks.decode import CacheSetting, forced, padded_targets
from kvbench.tasks.generation import Answering, full_answers
from kvbench.tasks.task import Answers, BatchTask, Bench, Part, Payload, TaskResult, joined


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


_KEPT_BYTES = 2**30
_FIRST = "first_disagreement_tokens"
Along = Literal["answer", "text"]


@dataclass(frozen=True, kw_only=True)
class Fidelity(BatchTask):
    """KL(full || policy) in nats per token and top-1 agreement, over every step after the first cut.

    along: `answer` is the full cache's own, up to `max_new_tokens`; `text` the reference, or the scored tokens of a
    window of running text, up to as many: a base model's own answer of thousands of tokens repeats itself. Along a text
    it is also told where the two first rank different tokens first.
    In every run the full cache is compared with itself over `check_tokens` steps of the first batch;
    its KL must be exactly 0.
    """

    protocol: ClassVar[str] = "lock_step_v1"
    hides_question: ClassVar[bool] = True
    knows_tokens: ClassVar[bool] = True

    max_new_tokens: int = 160
    check_tokens: int = 16
    along: Along = field(default="answer", metadata=PART)

    def __post_init__(self) -> None:
        check_known("task.fidelity.along", self.along, get_args(Along))
        if self.max_new_tokens < 1 or self.check_tokens < 1:
            raise ConfigError(
                f"task.fidelity has max_new_tokens={self.max_new_tokens}, check_tokens={self.check_tokens}; "
                "both must be at least 1"
            )

    @property
    def needs_reference(self) -> bool:
        """Whether every example must have a text."""
        return self.along == "text"

    def measure(self, bench: Bench, part: Part) -> Payload:
        """Compare on one batch. Raises: MeasureError if the full cache differs from itself."""
        if self.along == "text":
            answers = {example.id: answer_tokens(bench.loaded, example) for example in part.examples}
        else:
            answers = full_answers(bench, part, Answering(max_new_tokens=self.max_new_tokens))
        bench.prompts.once(
            ("equals itself", self), lambda: _check_itself(bench, part, answers, self.check_tokens, self.along)
        )
        rows = _compare(bench, part, answers, bench.setting, self.max_new_tokens, self.along)
        if self.along == "answer":  # where the first divergence of the answers says the same
            for row in rows:
                del row[_FIRST]
        return {example.id: row for example, row in zip(part.examples, rows, strict=True)}

    def summarise(self, bench: Bench, payloads: Sequence[Payload]) -> TaskResult:
        """Pool the tokens of all examples."""
        result = TaskResult(samples=joined(payloads))
        result.measure("kl_to_full", result.pooled("kl_sum", "num_compared_tokens", bench.examples), "nats/token")
        name, parts = "top1_agreement_fraction", ("num_agreeing_tokens", "num_compared_tokens")
        result.measure(name, result.pooled(*parts, bench.examples, scale=score_scale(name)))
        if self.along == "text":
            result.measure_means((_FIRST,), bench, {_FIRST: "tokens"})
        return result


def _check_itself(bench: Bench, part: Part, answers: Answers, check_tokens: int, along: Along) -> None:
    rows = _compare(bench, part, answers, bench.full, check_tokens, along, one_by_one=True)
    if any(row["kl_sum"] != 0.0 for row in rows):
        raise MeasureError("the full cache differs from itself (KL is not 0); the machine does not compute reliably")


@torch.inference_mode()
def _compare(
    bench: Bench,
    part: Part,
    answers: Answers,
    setting: CacheSetting,
    max_tokens: int,
    along: Along,
    *,
    one_by_one: bool = False,
) -> list[dict[str, Any]]:
    texts = [(answers[example.id] or [bench.loaded.eos_token_id])[:max_tokens] for example in part.examples]
    fed, real = padded_targets(texts, bench.loaded.eos_token_id, bench.loaded.device)
    lengths = [len(text) for text in texts]
    policy = part.decoding(setting, fed.shape[1], told=(fed, lengths))
    divergences, agreements = [], []
    per_pass = 1 if one_by_one else max(1, min(policy.tokens_per_pass, fed.shape[1]))
    full = _expected(bench, part, fed, lengths, (along, max_tokens), policy.logits.nbytes, one_by_one=per_pass == 1)
    for expected, got in zip(full, forced(policy, fed, lengths, one_by_one=per_pass == 1), strict=True):
        divergences.append(_kl(expected, got))
        agreements.append(expected.argmax(dim=-1) == got.argmax(dim=-1))
    kl = torch.stack(divergences, dim=1).masked_fill(~real, 0.0)
    if not bool(kl.isfinite().all()):
        row, token = torch.nonzero(~kl.isfinite())[0].tolist()
        raise NonFiniteError(f"the KL after token {token} of {part.examples[row].id} is not finite")
    policy.cache.check()
    agrees = torch.stack(agreements, dim=1) & real
    sums = (kl.double().sum(-1).tolist(), agrees.sum(-1).tolist(), real.sum(-1).tolist())
    differ = (real & ~agrees).long()
    places = zip(differ.argmax(-1).tolist(), differ.any(-1).tolist(), strict=True)
    first = [at + 1 if differs else None for at, differs in places]
    return [
        {
            "kl_sum": total,
            "num_agreeing_tokens": same,
            "num_compared_tokens": count,
            "kl_tokens_per_pass": per_pass,
            _FIRST: fed_before,
        }
        for total, same, count, fed_before in zip(*sums, first, strict=True)
    ]


def _expected(
    bench: Bench,
    part: Part,
    fed: Tensor,
    lengths: list[int],
    called: tuple[Along, int],
    logits_bytes: int,
    *,
    one_by_one: bool,
) -> Iterable[Tensor]:
    """Return the full cache's logits after each fed token: kept for the next cell if they are not too large.

    Otherwise they are computed in lock step with the policy's, and nothing of size tokens x vocabulary
    is held. called: what tells the fed text from any other of the part. logits_bytes: what those of one
    step take. No full cache is built where they are kept already.
    """

    def steps() -> Iterator[Tensor]:
        return forced(part.decoding(bench.full, fed.shape[1]), fed, lengths, one_by_one=one_by_one)

    if not part.shares or logits_bytes * fed.shape[1] > _KEPT_BYTES:
        return steps()
    # A graph writes its next logits over these, so they are copied.
    kept: list[Tensor] = part.once(("full logits", called, one_by_one), lambda: [logits.clone() for logits in steps()])
    return kept


def _kl(expected: Tensor, got: Tensor) -> Tensor:
    """KL(expected || got) per row in nats; equal logits give exactly 0."""
    log_p, log_q = expected.log_softmax(dim=-1), got.log_softmax(dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)
