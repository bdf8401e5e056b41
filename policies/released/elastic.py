"""Elastic Cache as its code has it, every departure from the paper an option."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvbench.cache import Needs, Plan, Policy, View
from kvbench.cache.selection import age_rank, entry_of_rank, keep_top, nearest_anchor, protected_entries
from kvbench.errors import ConfigError

from .choice import merge_with_lost_offset, sorted_order_as_rank


@dataclass(frozen=True, kw_only=True)
class ElasticReleased(Policy):
    """Elastic Cache as released (github.com/liuzuyan/ElasticCache, kv_cache.py at 3138e03).

    With every option False this is the method of the paper (arXiv 2407.18121), the policy `elastic`.

    order_taken_for_rank: anchors come from an argsort read as ranks, so they are the true ones only
        where importance grows with position.
    sink_offset_lost: a dropped token brings the key and value of the token `num_sinks` places before it,
        into that one's nearest anchor; some tokens are lost, and some that are kept count twice.
    one_too_few: the prompt leaves one entry fewer than the target.
    target_rounded_up: the target is rounded up, in that code's floating point.
    point_fixed_by_prompt: the entry that goes at decode has one index for ever, the prompt's target less
        `fixed_point`. It first eats the end of the prompt, then generated tokens first in, first out.
        Below zero the index counts from the newest entry.
    sink_lost_when_one_over: if the prompt is at most one entry over its target, the first token goes, and
        then at every eviction the oldest one.

    Where that code stops with an error (a target of three entries or fewer, a fixed point one below zero
    or further than the cache is long, a second prompt), the rule of the paper is used. The code keeps one
    index set for the heads of a layer and is right for one sequence only; a batch is treated row by row.
    """

    needs: ClassVar[Needs] = Needs.MASS
    granularity: ClassVar[Literal["layer", "kv_head"]] = "layer"
    native_positions: ClassVar[Literal["original", "in_cache", "released"]] = "released"

    fixed_point: int = 25
    num_sinks: int = 1
    order_taken_for_rank: bool = True
    sink_offset_lost: bool = True
    one_too_few: bool = True
    target_rounded_up: bool = True
    point_fixed_by_prompt: bool = True
    sink_lost_when_one_over: bool = True

    def __post_init__(self) -> None:
        if self.fixed_point < 1:
            raise ConfigError(f"policy.fixed_point is {self.fixed_point}; it must be at least 1 entry")
        if self.num_sinks < 1:
            raise ConfigError(f"policy.num_sinks is {self.num_sinks}; it must be at least 1 token")

    @property
    def counts_as_released(self) -> bool:
        """Whether the target is rounded up."""
        return self.target_rounded_up

    def plan(self, view: View) -> Plan:
        """Choose anchors per layer and merge into them; rows within their budget stay as they are."""
        over = view.valid.sum(dim=-1) - view.budget[:, None]
        keep, into, source = self._merged(view)
        if self.sink_lost_when_one_over:
            one = (over == 1)[..., None]
            keep = torch.where(one, view.valid & (age_rank(view.position) > 0), keep)
            into, source = torch.where(one, _own(view), into), torch.where(one, _own(view), source)
        within = (over <= 0)[..., None]
        return Plan(
            keep=torch.where(within, view.valid, keep),
            merge_into=torch.where(within, _own(view), into),
            merge_source=torch.where(within, _own(view), source),
        )

    def _merged(self, view: View) -> tuple[Tensor, Tensor, Tensor]:
        target = (view.budget - int(self.one_too_few)).clamp(min=1)
        ends = protected_entries(
            view.position, view.seen, target, num_sinks=self.num_sinks, num_recent=1, recent_fraction=0.0
        )
        importance = view.mass.float().mean(dim=1, keepdim=True).expand_as(view.mass)
        if self.order_taken_for_rank:
            count = (target[:, None] - ends.sum(dim=-1)).clamp(min=0)
            anchor = sorted_order_as_rank(importance, view.position, first=self.num_sinks, count=count) & ~ends
        else:
            anchor = keep_top(importance.masked_fill(ends, torch.inf), view.position, target) & ~ends
        if not self.sink_offset_lost:
            into = nearest_anchor(anchor=anchor, member=view.valid & ~ends, position=view.position)
            return anchor | ends, into, _own(view)
        nearest = nearest_anchor(anchor=anchor, member=view.valid, position=view.position)
        dropped = view.valid & ~anchor & ~ends & anchor.any(dim=-1, keepdim=True)
        into, source = merge_with_lost_offset(dropped, nearest, view.position, offset=self.num_sinks)
        return anchor | ends, into, source

    def victim(self, view: View) -> Tensor:
        """Free the entry at the fixed point, counted from the oldest."""
        held = view.valid.sum(dim=-1)
        point = (held - 1 - self.fixed_point).clamp(min=1).minimum((held - 2).clamp(min=0))
        if self.point_fixed_by_prompt:
            start = (view.prompt_budget - self.fixed_point)[:, None]
            at = torch.where(start >= 0, start, held + start)
            point = torch.where((start == -1) | (at < 0), point, at)
        if self.sink_lost_when_one_over:
            point = torch.where((view.prompt - view.prompt_budget <= 1)[:, None], 0, point)
        return entry_of_rank(view.position, point.expand(view.position.shape[:2]))


def _own(view: View) -> Tensor:
    return torch.arange(view.position.shape[-1], device=view.position.device).expand_as(view.position)
