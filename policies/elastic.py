"""Elastic Cache: merge the prompt around anchors, then drop at a fixed point."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from kvbench.cache import Needs, Plan, Policy, View
from kvbench.cache.selection import entry_before_newest, keep_top, nearest_anchor, protected_entries
from kvbench.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Elastic(Policy):
    """Elastic Cache as described (arXiv 2407.18121).

    Prompt: a layer's importance is the mean over heads of the attention column sums; the top entries
    are anchors (Sec. 3.2), every other entry joins its nearest anchor's bucket (Eq. 2), and each
    anchor becomes the plain mean of its bucket (Eq. 3). Decode: when the budget is exceeded, the
    entry `fixed_point` places before the newest one goes (fixed-point elimination, 25 in Sec. 4.1).
    In a cache of fewer than `fixed_point` + 2 entries the point falls on the entry after the first,
    which makes the output stage a sliding window. The first and the newest token are protected: they
    count in the budget, stay as they are, and are no anchors. What the release does instead is another
    policy.

    To see what a part is worth it can be taken out. merge: what anchors take in, "none" drops the others as they are.
    recent_fraction: newest tokens that are protected too, as a share of the budget; the paper has none. A large
    `fixed_point` makes the output stage a sliding window.
    """

    needs: ClassVar[Needs] = Needs.MASS
    granularity: ClassVar[Literal["layer", "kv_head"]] = "layer"

    fixed_point: int = 25
    merge: Literal["both", "keys", "values", "none"] = "both"
    recent_fraction: float = 0.0

    def __post_init__(self) -> None:
        if self.fixed_point < 1:
            raise ConfigError(f"policy.fixed_point is {self.fixed_point}; it must be at least 1 entry")
        if not 0.0 <= self.recent_fraction <= 1.0:
            raise ConfigError(f"policy.recent_fraction is {self.recent_fraction:g}; it must lie in [0, 1]")

    def plan(self, view: View) -> Plan:
        """Choose anchors per layer and merge the rest into them."""
        protected = protected_entries(
            view.position, view.seen, view.budget, num_sinks=1, num_recent=1, recent_fraction=self.recent_fraction
        )
        importance = view.mass.mean(dim=1, keepdim=True).expand_as(view.mass).masked_fill(protected, float("inf"))
        keep = keep_top(importance, view.position, view.budget)
        merge_into = nearest_anchor(anchor=keep & ~protected, member=view.valid & ~protected, position=view.position)
        if self.merge == "none":
            return Plan(keep=keep)
        return Plan(
            keep=keep, merge_into=merge_into, merge_keys=self.merge != "values", merge_values=self.merge != "keys"
        )

    def victim(self, view: View) -> Tensor:
        """Free the entry with `fixed_point` newer ones; the first token stays while there is another."""
        return entry_before_newest(view.position, self.fixed_point, sinks=1)
