"""Prefill and decode: the two things every task does, with true positions.

The same loop serves every policy, the full cache included; `model.generate` with a `PolicyCache`
gives the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from kvbench.cache import Budget, Policy
from kvbench.cache.positions import PositionMode
from kvbench.errors import NonFiniteError
from kvbench.models.inputs import PromptBatch
from kvbench.models.loader import LoadedModel

if TYPE_CHECKING:
    from kvbench.cache import PolicyCache
    from kvbench.cache.setup import OnPlan

Engine = Literal["eager", "graph"]
ENGINES: tuple[str, ...] = get_args(Engine)
OnSettle = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheSetting:
    """What a cell puts in the cache's hands: policy, budget, resolved position mode and decode engine."""

    policy: Policy
    budget: Budget
    positions: PositionMode
    engine: Engine = "eager"

    def decoding(
        self,
        loaded: LoadedModel,
        batch: PromptBatch,
        reserve_tokens: int,
        *,
        on_settle: OnSettle = nullcontext,
        on_plan: OnPlan | None = None,
    ) -> Decoding:
        """Prefill `batch` into a fresh cache and return it ready for `reserve_tokens` decode steps."""
        cache = self.cache(loaded, batch, reserve_tokens, on_settle=on_settle, on_plan=on_plan)
        return self.decoding_with(loaded, batch, cache)

    def decoding_with(
        self, loaded: LoadedModel, batch: PromptBatch, cache: PolicyCache, *, prompt_logits: Tensor | None = None
    ) -> Decoding:
        """Return `batch` ready to be decoded with `cache`; prompt_logits where it has taken the prompt already."""
        if self.engine == "graph":
            from kvbench.runs.graph import GraphDecoding

            return GraphDecoding(loaded, batch, cache, prompt_logits=prompt_logits)
        return Decoding(loaded, batch, cache, prompt_logits=prompt_logits)

    def cache(
        self,
        loaded: LoadedModel,
        batch: PromptBatch,
        reserve_tokens: int,
        *,
        on_settle: OnSettle = nullcontext,
        on_plan: OnPlan | None = None,
    ) -> PolicyCache:
        """Return an empty cache for `batch`, with room for `reserve_tokens` more."""
        from kvbench.cache import PolicyCache  # needs transformers

        return PolicyCache(
            loaded.model,
            self.policy,
            self.budget,
            positions=self.positions,
            reserve_tokens=reserve_tokens,
            prompt_kind=batch.kind,
            row_seeds=batch.row_seeds,
            on_settle=on_settle,
            on_plan=on_plan,
        )


class Decoding:
    """One batch being decoded: `logits` (B, V) float32 are those of the next token. Every pass beats.

    prompt_logits: those after the prompt, where `cache` has taken the prompt already.
    """

    def __init__(
        self, loaded: LoadedModel, batch: PromptBatch, cache: Any, *, prompt_logits: Tensor | None = None
    ) -> None:
        from kvbench.cache.attention import cache_argument  # needs transformers

        self._model, self._beat = loaded.model, loaded.beat
        self.cache: PolicyCache = cache
        self._cache_argument = cache_argument(loaded.model, cache)
        self._tokens = torch.zeros_like(batch.tensors["input_ids"][:, -1:])
        self._position = batch.last_position_ids.clone()
        self.logits: Tensor = self._prefill(batch) if prompt_logits is None else prompt_logits
        if batch.question_ids is not None:
            self.extend(batch.question_ids)

    def _prefill(self, batch: PromptBatch) -> Tensor:
        output = self._model(
            **batch.tensors,
            position_ids=batch.position_ids,
            **self._cache_argument,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits[:, -1].float()
        self._beat()
        return logits

    def extend(self, tokens: Tensor) -> Tensor:
        """Feed a chunk of tokens, (B, N), after everything so far; return the next logits (B, V) float32.

        The cache holds what its policy left; the chunk attends to that and to itself, and is cut with it, as
        part of the prompt even if it is a single token.
        """
        self.cache.expect_prompt(tokens.shape[1])
        steps = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
        output = self._model(
            input_ids=tokens,
            position_ids=self._position + steps,
            **self._cache_argument,
            use_cache=True,
            logits_to_keep=1,
        )
        self._position += tokens.shape[1]
        self.logits = output.logits[:, -1].float()
        self._beat()
        return self.logits

    def prepare(self) -> None:
        """Do ahead of time what the first step would do once; nothing in the eager engine."""

    def step(self, tokens: Tensor) -> Tensor:
        """Feed one token per row, (B,), at its true position; return the next logits (B, V) float32."""
        self._tokens.copy_(tokens[:, None])
        self.logits = self._forward()
        self._beat()
        return self.logits

    def _forward(self) -> Tensor:
        """One decode step; it reads and changes tensors in place only, so that it can be captured."""
        self._position += 1
        output = self._model(
            input_ids=self._tokens,
            position_ids=self._position,
            **self._cache_argument,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits[:, -1].float()
        return logits


@torch.inference_mode()
def greedy(
    decoding: Decoding,
    *,
    end_token_ids: Collection[int],
    max_new_tokens: int,
    on_step: Callable[[PolicyCache, list[bool]], None] | None = None,
) -> list[list[int]]:
    """Return the greedy answer of each row from where `decoding` stands, without its end token, any of `end_token_ids`.

    on_step gets the cache and which rows are still being answered, after each step. Raises:
    NonFiniteError for logits whose largest is NaN or infinite, in a row that is still being answered, and for
    victims that were chosen by NaN, in any row.
    """
    answers: list[list[int]] = [[] for _ in range(decoding.logits.shape[0])]
    going = [True] * len(answers)
    for number in range(max_new_tokens):
        tokens, largest = decoding.logits.argmax(dim=-1), decoding.logits.amax(dim=-1)
        if not bool((largest.isfinite() | ~torch.tensor(going, device=largest.device)).all()):
            raise NonFiniteError(f"the logits of new token {number} are not finite")
        for row, token in enumerate(tokens.tolist()):
            going[row] = going[row] and token not in end_token_ids
            if going[row]:
                answers[row].append(token)
        if not any(going) or number == max_new_tokens - 1:
            break
        decoding.step(tokens)
        if on_step is not None:
            on_step(decoding.cache, going)
    decoding.cache.check()
    return answers


def padded_targets(answers: list[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return answers as (B, N) int64 padded right, and (B, N) bool, True at real tokens."""
    longest = max(len(answer) for answer in answers)
    rows = [answer + [pad] * (longest - len(answer)) for answer in answers]
    real = [[True] * len(answer) + [False] * (longest - len(answer)) for answer in answers]
    return torch.tensor(rows, device=device), torch.tensor(real, device=device)
