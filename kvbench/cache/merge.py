"""What becomes of entries that go: the part of a policy that lets them join others that stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvbench.cache.view import Needs, Plan, View


@dataclass(frozen=True, kw_only=True)
class Merge:
    """Let entries that go join others that stay, wherever a plan is made. Class flag: `needs`, statistics of `into`."""

    needs: ClassVar[Needs] = Needs.NOTHING

    def into(self, view: View, keep: Tensor, protected: Tensor) -> Plan:
        """Return the plan that keeps `keep` (B, H, T) and says who joins whom.

        protected (B, H, T) bool: the sinks and recent tokens among what is kept.
        """
        raise NotImplementedError(f"{type(self).__name__} must define into(view, keep, protected)")
