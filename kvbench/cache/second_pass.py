"""A second pass over the prompt: the model repeats it over the whole cache, before anything of it is cut.

A policy that declares `Needs.REPEATED` reads the largest attention that each entry receives meanwhile (KVzip,
arXiv 2505.23416). Its layers hold a prompt that exceeds the budget until `read_again` has run, which a task does within
the time to the first token. The prompt is repeated in chunks, each by itself: told to repeat, the model is fed the
chunk's own tokens, and what it looked at is noted; nothing of that stays in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvbench.cache.attention import cache_argument

if TYPE_CHECKING:
    from kvbench.cache.cache import PolicyCache
    from kvbench.cache.recording import CalibrationCache

OVERLAP_TOKENS = 8  # of the chunk before, by which a later chunk's begin is named


@dataclass(frozen=True, kw_only=True, slots=True)
class Instruction:
    """Tokens that ask for the whole or the first chunk (`first`), for a later one (`later`), and what follows (`end`).

    Empty for a model without a tokenizer, whose answers mean nothing and whose costs are nearly the same.
    """

    first: Sequence[int] = ()
    later: Sequence[int] = ()
    end: Sequence[int] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Repeated:
    """One chunk that is repeated: real (B, N) bool says which of the tokens fed count; positions start to end of it."""

    real: Tensor
    start: int
    end: int


@dataclass(kw_only=True, slots=True)
class SecondPass:
    """What the layers of a cache share: the chunk that is repeated now, None outside of a second pass."""

    chunk: Repeated | None = None


@torch.no_grad()
def read_again(
    model: Any,
    cache: PolicyCache | CalibrationCache,
    tokens: Tensor,
    real: Tensor | None = None,
    *,
    last_position: Tensor | None = None,
    instruction: Instruction | None = None,
    beat: Callable[[], None] = lambda: None,
) -> None:
    """Repeat the prompt `tokens` (B, T) and let `cache`, which waits for it, cut it.

    real (B, T): False at pads, which stand on the left; None for none. last_position: that of the prompt's last token,
    (B, 1) or (4, B, 1); counted where not given.
    """
    asks = instruction or Instruction()
    real = torch.ones_like(tokens, dtype=torch.bool) if real is None else real.bool()
    if last_position is None:
        last_position = real.sum(dim=-1, keepdim=True) - 1
    rows = [row[mask].tolist() for row, mask in zip(tokens, real, strict=True)]
    size = cache.policy_layers[0].setup.policy.repeat_tokens
    for start in range(0, max(map(len, rows)), size):
        fed = [_fed(row, start, size, asks) for row in rows]
        longest = max(map(len, fed))
        mask = torch.tensor([[False] * (longest - len(row)) + [True] * len(row) for row in fed], device=tokens.device)
        ids = torch.tensor([(row[:1] or [0]) * (longest - len(one)) + one for one, row in zip(fed, rows, strict=True)])
        position = last_position + mask.long().cumsum(dim=-1).clamp(min=1)
        cache.second_pass.chunk = Repeated(real=mask, start=start, end=start + size)
        try:
            model(
                input_ids=ids.to(tokens.device),
                position_ids=position,
                **cache_argument(model, cache),
                use_cache=True,
                logits_to_keep=1,
            )
        finally:
            cache.second_pass.chunk = None
        beat()
    for layer in cache.policy_layers:
        layer.cut_repeated()


def projected_lengths(values: Tensor, weight: Tensor) -> Tensor:
    """Return (B, H, G, T) float32: the L2 norm of what a value adds to the output through each query head.

    values (B, H, T, D), weight (H, G, D, E), the output projection. No (T, E) is made: |W v| is the root of v' W W' v.
    """
    outer = torch.matmul(weight.float(), weight.float().transpose(-1, -2))
    states = values.float()[:, :, None]
    lengths: Tensor = (torch.matmul(states, outer[None]) * states).sum(dim=-1).clamp(min=0.0).sqrt()
    return lengths


def _fed(row: list[int], start: int, size: int, asks: Instruction) -> list[int]:
    """Return what a row is fed for the chunk from `start` on; nothing where its prompt has ended."""
    chunk = row[start : start + size]
    if not chunk:
        return []
    before = [*asks.later, *row[max(0, start - OVERLAP_TOKENS) : start]] if start else [*asks.first]
    return [*before, *asks.end, *chunk]
