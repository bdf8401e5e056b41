"""How far the policy's next-token distribution is from the full cache's, along one text.

Both caches are fed the full cache's own greedy answer, in lock step, so every step compares two
distributions over the same history and nothing of size tokens x vocabulary is stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvbench.datasets.base import Example
from kvbench.errors import ConfigError, MeasureError, NonFiniteError
from kvbench.metrics.intervals import pooled_ratio_interval
from kvbench.models.inputs import PromptBatch
from kvbench.runs.full_answers import Answers
from kvbench.runs.generation import full_answers
from kvbench.runs.loop import CacheSetting, padded_targets
from kvbench.runs.task import Bench, TaskResult


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """KL(full || policy) in nats per token and top-1 agreement, over every step after the first cut.

    In every run the full cache is compared with itself over `check_tokens` steps of the first batch;
    its KL must be exactly 0.
    """

    protocol: ClassVar[str] = "lock_step_v1"

    max_new_tokens: int = 160
    check_tokens: int = 16

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.check_tokens < 1:
            raise ConfigError(
                f"task.fidelity has max_new_tokens={self.max_new_tokens}, check_tokens={self.check_tokens}; "
                "both must be at least 1"
            )

    def run(self, bench: Bench) -> TaskResult:
        """Compare on all examples. Raises: MeasureError if the full cache differs from itself."""
        batches = bench.batches()
        answers = full_answers(bench, batches, self.max_new_tokens)
        examples, batch = batches[0]
        self_check = _compare(bench, examples, batch, answers, bench.full, self.check_tokens)
        if any(row["kl_sum"] != 0.0 for row in self_check):
            raise MeasureError(
                "the full cache differs from itself (KL is not 0); the machine does not compute reliably"
            )
        result = TaskResult()
        for examples, batch in batches:
            rows = _compare(bench, examples, batch, answers, bench.setting, self.max_new_tokens)
            result.samples |= {example.id: row for example, row in zip(examples, rows, strict=True)}
            bench.advance(len(examples) / len(bench.examples))
        _summarise(bench, result)
        return result


@torch.inference_mode()
def _compare(
    bench: Bench,
    examples: Sequence[Example],
    batch: PromptBatch,
    answers: Answers,
    setting: CacheSetting,
    max_tokens: int,
) -> list[dict[str, Any]]:
    texts = [(answers[example.id] or [bench.loaded.eos_token_id])[:max_tokens] for example in examples]
    fed, real = padded_targets(texts, bench.loaded.eos_token_id, bench.loaded.device)
    full = bench.full.decoding(bench.loaded, batch, fed.shape[1])
    policy = setting.decoding(bench.loaded, batch, fed.shape[1])
    divergences, agreements = [], []
    for number in range(fed.shape[1]):
        expected, got = full.step(fed[:, number]), policy.step(fed[:, number])
        divergences.append(_kl(expected, got))
        agreements.append(expected.argmax(dim=-1) == got.argmax(dim=-1))
    kl = torch.stack(divergences, dim=1).masked_fill(~real, 0.0)
    if not bool(kl.isfinite().all()):
        row, token = torch.nonzero(~kl.isfinite())[0].tolist()
        raise NonFiniteError(f"the KL after token {token} of {examples[row].id} is not finite")
    agrees = torch.stack(agreements, dim=1) & real
    sums = (kl.double().sum(-1).tolist(), agrees.sum(-1).tolist(), real.sum(-1).tolist())
    return [
        {"kl_sum": total, "num_agreeing_tokens": same, "num_compared_tokens": count}
        for total, same, count in zip(*sums, strict=True)
    ]


def _kl(expected: Tensor, got: Tensor) -> Tensor:
    """KL(expected || got) per row in nats; equal logits give exactly 0."""
    log_p, log_q = expected.log_softmax(dim=-1), got.log_softmax(dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def _summarise(bench: Bench, result: TaskResult) -> None:
    rows = [result.samples[example.id] for example in bench.examples]
    counts = [row["num_compared_tokens"] for row in rows]
    kl = pooled_ratio_interval([row["kl_sum"] for row in rows], counts, bench.clusters)
    agreement = pooled_ratio_interval([row["num_agreeing_tokens"] for row in rows], counts, bench.clusters)
    result.measure("kl_to_full", kl, "nats/token")
    result.measure("top1_agreement_fraction", agreement)
