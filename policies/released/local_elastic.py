"""The "Local" cache that Elastic Cache's code compares itself with, every departure an option."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from kvbench.cache import Plan, Policy, View
from kvbench.cache.selection import age_rank, entry_of_rank
from kvbench.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class LocalElasticRelease(Policy):
    """LocalCache of Elastic Cache's code (github.com/liuzuyan/ElasticCache, kv_cache.py at 3138e03).

    It stands for StreamingLLM there, but has one sink and no positions inside the cache. With 4 sinks,
    both options False and positions=in_cache this is the policy `streaming_llm` (arXiv 2309.17453).

    target_rounded_up: the target is rounded up, in that code's floating point.
    sinks_before_newest: where the target has no room for more than the sinks, the newest token goes;
        otherwise one entry is left to it.
    """

    native_positions: ClassVar[Literal["original", "in_cache", "released"]] = "released"

    num_sinks: int = 1
    target_rounded_up: bool = True
    sinks_before_newest: bool = True

    def __post_init__(self) -> None:
        if self.num_sinks < 0:
            raise ConfigError(f"policy.num_sinks is {self.num_sinks}; it must be 0 or more tokens")

    @property
    def smallest_budget_tokens(self) -> int:
        """Sinks must fit."""
        return max(1, self.num_sinks)

    @property
    def counts_as_released(self) -> bool:
        """Whether the target is rounded up."""
        return self.target_rounded_up

    def plan(self, view: View) -> Plan:
        """Keep the sinks and the newest entries; what lies between goes."""
        rank = age_rank(view.position)
        sinks = self._sinks(view)
        goes = (rank >= sinks) & (rank < sinks + self._over(view))
        return Plan(keep=view.valid & ~goes)

    def victim(self, view: View) -> Tensor:
        """Free the entry right after the sinks."""
        return entry_of_rank(view.position, self._sinks(view)[..., 0].expand(view.position.shape[:2]))

    def _sinks(self, view: View) -> Tensor:
        """(B, 1 or H, 1): how many of the oldest entries are kept as sinks."""
        room = view.budget[:, None, None]
        if self.sinks_before_newest:
            return room.clamp(max=self.num_sinks)
        sinks = view.position < (room - 1).clamp(max=self.num_sinks)  # one that is gone makes no room for another
        return (sinks & view.valid).sum(dim=-1, keepdim=True)

    def _over(self, view: View) -> Tensor:
        return (view.valid.sum(dim=-1) - view.budget[:, None]).clamp(min=0)[..., None]
