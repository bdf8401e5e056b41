"""When each entry left the cache, and what it was merged into: for looking, never for deciding.

    log = EvictionLog(num_tokens=prompt + answer)
    cache = PolicyCache(model, policy, budget, on_plan=log.note_plan)
    ...                                    # the prompt
    log.after_prompt(cache)
    ...                                    # one token
    log.after_step(cache, [True])

Nothing that was evicted comes back, so one number per layer, head and token tells the whole story. It is
kept on the device of the cache; nothing waits for the host before `freed` is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvbench.cache.slots import Entries, Slots
from kvbench.cache.view import Plan

if TYPE_CHECKING:
    from kvbench.cache.policy_cache import PolicyCache

HELD = -1


class EvictionLog:
    """The story of one batch; a row sees at most `num_tokens` tokens, N below."""

    def __init__(self, *, num_tokens: int) -> None:
        self._num_tokens = num_tokens
        self._step = 0
        self._freed: list[Tensor] = []
        self._held: list[Tensor] = []
        self._merged: dict[int, Tensor] = {}

    def note_plan(self, layer: int, entries: Entries, plan: Plan) -> None:
        """Note which entries join another one; `PolicyCache` calls it with every plan."""
        if plan.merge_into is None:
            return
        position, target = entries.position, entries.position.gather(-1, plan.merge_into)
        joins = (position >= 0) & ~plan.keep & (target != position)
        if layer not in self._merged:
            self._merged[layer] = self._column(position, HELD)
        at = torch.where(joins, position, self._num_tokens)
        self._merged[layer].scatter_(-1, at, torch.where(joins, target, HELD))

    def after_prompt(self, cache: PolicyCache) -> None:
        """Take what the prompt left; everything else of it was dropped, which counts as step 0."""
        for slots, ledger in ((_slots(layer.slots), layer.ledger) for layer in cache.policy_layers):
            held = self._held_now(slots)
            seen = torch.tensor(ledger.seen, device=held.device)[:, None, None]
            gone = ~held & (torch.arange(held.shape[-1], device=held.device) < seen)
            self._freed.append(self._column(slots.entries.position, HELD)[..., :-1].masked_fill_(gone, 0))
            self._held.append(held)

    def after_step(self, cache: PolicyCache, going: Sequence[bool]) -> None:
        """Note what a decode step freed, its own new token included, in the rows that are `going`."""
        self._step += 1
        for index, layer in enumerate(cache.policy_layers):
            now, before = self._held_now(_slots(layer.slots)), self._held[index]
            rows = torch.tensor(going, device=now.device)[:, None, None]
            newest = torch.tensor(layer.ledger.seen, device=now.device)[:, None, None] - 1
            before |= rows & (torch.arange(now.shape[-1], device=now.device) == newest)
            gone = before & ~now & rows
            self._freed[index].masked_fill_(gone, self._step)
            before &= ~gone

    def freed(self, row: int) -> Tensor:
        """Return (L, H, N) int64: the decode step that freed each entry, 0 for the prompt's cut, -1 for held or none.

        Entries beyond the tokens that the row has seen are -1 too.
        """
        return torch.stack([layer[row] for layer in self._freed]).cpu()

    def merged_into(self, row: int) -> Tensor | None:
        """Return (L, H, N) int64: the position of the entry that each one joined, -1 for none; None without merging."""
        if not self._merged:
            return None
        nothing = torch.full_like(self._freed[0], HELD)
        layers = [self._merged.get(index, nothing)[row, :, : self._num_tokens] for index in range(len(self._freed))]
        return torch.stack(layers).cpu()

    def _column(self, position: Tensor, value: int) -> Tensor:
        """(B, H, N + 1) int64; the last place takes what is not to be noted."""
        return position.new_full((*position.shape[:2], self._num_tokens + 1), value)

    def _held_now(self, slots: Slots) -> Tensor:
        """(B, H, N) bool."""
        position = slots.entries.position
        at = torch.where(position >= 0, position, self._num_tokens)
        return self._column(position, 0).scatter_(-1, at, 1)[..., :-1].bool()


def _slots(slots: Slots | None) -> Slots:
    assert slots is not None, "the prompt comes first"
    return slots
