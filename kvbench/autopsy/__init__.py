"""What a policy kept and dropped, sample by sample, replayed, recorded and shown; and how much of that is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from kvbench.errors import check_within

_Item = TypeVar("_Item")
_MOST_TOKENS = 60_000


@dataclass(frozen=True, kw_only=True)
class AutopsySettings:
    """num_samples: items per cell, spread evenly over the data set and the same for every policy; 0 for none.

    max_new_tokens: steps of decode that are followed. max_prompt_tokens: items with longer prompts are left
    out, and the file says so. No measured number and no key depends on any of this.
    """

    num_samples: int = 0
    max_new_tokens: int = 160
    max_prompt_tokens: int = 4096

    def __post_init__(self) -> None:
        most = (1, _MOST_TOKENS // 2)
        check_within("autopsy", self, num_samples=(0, None), max_new_tokens=most, max_prompt_tokens=most)

    def chosen(self, items: Sequence[_Item]) -> list[_Item]:
        """Return the items to look at, by their place in the list alone."""
        count = min(self.num_samples, len(items))
        return [items[index * len(items) // count] for index in range(count)]
