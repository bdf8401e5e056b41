"""CaM's merge: the value of what goes may be spread over the values after it, by a draw."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvbench.cache import Joining, Merge, Needs, Plan, View
from kvbench.cache.selection import draws, oldest_first
from kvbench.errors import ConfigError

_BLOCK = 512  # entries whose share of all others lies in memory at once
_NO_POSITION = torch.iinfo(torch.int64).max
_STREAM = 1 << 40  # others than those by which a policy draws


@dataclass(frozen=True, kw_only=True)
class CaM(Merge):
    """An entry that goes is merged with a chance of its attention over the mean of those after it that stay.

    Then its value over `spread_tokens` is added to each of the next `spread_tokens` values that stay; keys stay, and
    where fewer come after it the rest is lost. Attention is the row of the newest query.

    Source: CaM (Zhang et al., ICML 2024) and its release (github.com/zyxxmu/cam at fc80e64), whose Llama merges so at
    each step over StreamingLLM's window, with 32 tokens, and drops what a prompt loses. `prompt_too` merges that as
    well, by the row of the prompt's last query and all at once: hundreds of values then join the same 32, those that
    come first after the gap, so it does harm. Differs in: the query heads of a KV head have their mean; a draw is a
    hash of seed, sequence, layer, head and token; what is merged goes at that step, where the release still sees it
    for one step more. The release's OPT merges wherever the chance is above 1, its streaming code draws by accumulated
    attention over 16 tokens; neither is here.
    """

    needs: ClassVar[Needs] = Needs.PROBS
    at_decode: ClassVar[bool] = True

    spread_tokens: int = 32
    prompt_too: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.spread_tokens < 1:
            raise ConfigError(f"policy.merge.spread_tokens is {self.spread_tokens}; it must be at least 1")

    def into(self, view: View, keep: Tensor, protected: Tensor) -> Plan:
        """Draw for every entry that goes, and add what the drawn ones give to the values that stay."""
        if not self.prompt_too and view.prefill:
            return Plan(keep=keep)
        order = oldest_first(view.position)
        kept = keep.gather(-1, order)
        row = view.probs.gather(-1, order).double().masked_fill(~kept, 0.0)
        number, sum_up = kept.long().cumsum(dim=-1), row.cumsum(dim=-1)
        newer, newer_sum = number[..., -1:] - number, sum_up[..., -1:] - sum_up
        mean = torch.zeros_like(row).scatter_(-1, order, newer_sum / newer)
        older = torch.zeros_like(number).scatter_(-1, order, number - kept.long())  # of the survivors
        chance = (view.probs.double() / mean).masked_fill(~(view.valid & ~keep), 0.0)
        merged = draws(view.position, view.row_seed, self._stream(view)) < chance
        return Plan(keep=keep, values=self._added(view.values, older, merged, keep))

    def _added(self, values: Tensor, older: Tensor, merged: Tensor, keep: Tensor) -> Tensor:
        """(B, H, T, D): values with what survivors get; `older` (B, H, T): how many survivors are older than each."""
        number, given = torch.promote_types(values.dtype, torch.float32), []
        brought = (values.to(number) / self.spread_tokens).masked_fill(~merged[..., None], 0.0)
        for place, stays in zip(older.split(_BLOCK, dim=-1), keep.split(_BLOCK, dim=-1), strict=True):
            behind = place[..., None] - older[:, :, None]
            takes = (behind >= 0) & (behind < self.spread_tokens) & stays[..., None]
            given.append(torch.matmul(takes.to(number), brought))
        return torch.cat(given, dim=2).add_(values).to(values.dtype)

    def _stream(self, view: View) -> int:
        return _STREAM + self.seed * view.num_layers + view.layer

    def joining(self, view: View, victim: Tensor) -> Joining:
        """Draw for the victim, and name the values after it."""
        at = view.position.gather(-1, victim[..., None])
        newer = view.position > at
        mean = view.probs.double().masked_fill(~newer, 0.0).sum(dim=-1, keepdim=True) / newer.sum(dim=-1, keepdim=True)
        chance = view.probs.gather(-1, victim[..., None]).double() / mean
        merged = draws(at, view.row_seed, self._stream(view)) < chance
        most = min(self.spread_tokens, view.position.shape[-1])
        next_ones = view.position.masked_fill(~newer, _NO_POSITION).topk(most, dim=-1, largest=False)
        takes = merged & (next_ones.values < _NO_POSITION)
        weight = takes.float() / self.spread_tokens
        return Joining(into=next_ones.indices, weight=weight, own=torch.ones_like(weight), keys=False)
