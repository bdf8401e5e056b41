"""PrefixKV: every layer keeps one share of its attention, one set for its heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from kvbench.cache import Needs, ScorePolicy, View
from kvbench.cache.selection import entry_before_newest
from kvbench.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class PrefixKV(ScorePolicy):
    """Keep what a layer attends to most, by the mean over its heads; at decode the entry at a fixed point goes.

    Source: PrefixKV (arXiv 2412.03409, Sec. 3.2): the column sums of the prompt's attention are averaged over the heads
    and sorted, and each layer keeps a prefix of that order, as long as the yaml's allocation `prefix` says; the first
    and the newest token are protected. When one is too many at decode, the entry `fixed_point` places before the newest
    goes, as in Elastic Cache, on whose code it builds (prefixkv.py at 39b7265, distance -25). Differs in: that place is
    counted from the newest entry, where the release drops the same index at every step; layers are divided for the
    sequence itself, where the release reads shares that were averaged over other data.
    """

    needs: ClassVar[Needs] = Needs.MASS
    granularity: ClassVar[Literal["layer", "kv_head"]] = "layer"

    num_sinks: int = 1
    num_recent: int = 1
    fixed_point: int = 25

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fixed_point < 1:
            raise ConfigError(f"policy.fixed_point is {self.fixed_point}; it must be at least 1 entry")

    def score(self, view: View) -> Tensor:
        """Return (B, 1, T): the attention mass, averaged over the heads."""
        return view.mass.mean(dim=1, keepdim=True)

    def victim(self, view: View) -> Tensor:
        """Free the entry with `fixed_point` newer ones; the sinks stay while there is another."""
        return entry_before_newest(view.position, self.fixed_point, sinks=self.num_sinks)
