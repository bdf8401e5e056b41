"""PyramidKV's division: lower layers hold more than upper ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from torch import Tensor

from kvbench.cache import Allocation, Room
from kvbench.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Pyramid(Allocation):
    """Beyond the protected entries, layers hold from most in the first to 1 / `beta` of the mean in the last.

    Source: PyramidKV (arXiv 2406.02069, Sec. 4.2): of C entries beside the window the last layer gets C / beta, the
    first 2 C less that, those between on a line; where the first would exceed the prompt it gets all of it, and the
    last what is left. Differs in: a layer's rest of a division goes to the one that mirrors it, so that the total is
    exact; the release (KVCache-Factory c97f9d7) cuts steps down to whole numbers and divides evenly for short prompts.
    """

    beta: int = 20

    def __post_init__(self) -> None:
        if self.beta < 1:
            raise ConfigError(f"policy.allocation.beta is {self.beta}; it must be at least 1, which divides evenly")

    def layers(self, room: Room, told: Sequence[Tensor]) -> Sequence[int]:
        """Return a line from the first to the last layer, symmetric about the budget."""
        free, longest, last = room.budget - room.protected, room.tokens - room.protected, room.num_layers - 1
        most = min(2 * free - free // self.beta, longest)
        slope = Fraction(2 * (most - free), last) if last else Fraction(0)
        upper = [int(most - layer * slope) for layer in range(room.num_layers // 2)]
        middle = [free] * (room.num_layers % 2)
        lower = [2 * free - share for share in reversed(upper)]
        return [room.protected + share for share in (*upper, *middle, *lower)]
