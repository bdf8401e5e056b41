"""Drive a model through a cache with given tokens, and look at what the cache holds after every step."""

from __future__ import annotations

import gc
import types
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvbench.cache import Policy, PolicyCache, cache_argument
from kvbench.cache.second_pass import read_again

Held = list[list[list[tuple[int, ...]]]]
"""Positions held, ascending: [layer][row][head]."""


@dataclass(kw_only=True)
class Trace:
    """A drive: prompt logits (B, T, V), logits of each decode step (B, V), what was held after each pass."""

    cache: PolicyCache
    prompt_logits: Tensor
    logits: list[Tensor]
    held: list[Held]


def held_positions(cache: PolicyCache) -> Held:
    layers = []
    for layer in cache.policy_layers:
        assert layer.slots is not None
        rows = layer.slots.entries.position.tolist()
        layers.append([[tuple(sorted(p for p in head if p >= 0)) for head in row] for row in rows])
    return layers


@torch.no_grad()
def drive(model: Any, cache: Any, tokens: Tensor, prompt_tokens: int, mask: Tensor | None = None) -> Trace:
    """Prefill `prompt_tokens`, then force the rest of `tokens` (B, N) in one by one; mask (B, N) is 0 at left pads."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0) if mask is not None else None
    held: list[Held] = []
    logits = []
    for start, end in [(0, prompt_tokens), *((at, at + 1) for at in range(prompt_tokens, tokens.shape[1]))]:
        out = model(
            tokens[:, start:end],
            attention_mask=None if mask is None else mask[:, :end],
            position_ids=None if positions is None else positions[:, start:end],
            **cache_argument(model, cache),
        )
        logits.append(out.logits)
        repeat_where_asked(model, cache, tokens[:, :end], None if mask is None else mask[:, :end])
        if isinstance(cache, PolicyCache):
            held.append(held_positions(cache))
    return Trace(cache=cache, prompt_logits=logits[0], logits=[step[:, -1] for step in logits[1:]], held=held)


def repeat_where_asked(model: Any, cache: Any, tokens: Tensor, mask: Tensor | None = None) -> None:
    """Give the prompt, all that came so far, a second pass if the policy waits for it."""
    if isinstance(cache, PolicyCache) and cache.awaits_second_pass:
        read_again(model, cache, tokens, mask)


def tensors_of(root: object) -> list[Tensor]:
    """Return every tensor that `root` reaches through attributes and containers; modules and types left out."""
    skipped = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, nn.Module, Policy)
    seen: set[int] = set()
    found: list[Tensor] = []
    todo = [root]
    while todo:
        item = todo.pop()
        if id(item) in seen or isinstance(item, skipped):
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            found.append(item)
        todo.extend(gc.get_referents(item))
    return found


def storage_bytes(tensors: list[Tensor]) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
