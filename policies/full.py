"""The full cache: nothing is ever dropped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvbench.cache import Policy


@dataclass(frozen=True, kw_only=True)
class Full(Policy):
    """Keep every token, in the same slot storage as every other policy; the budget does not apply."""

    bounded: ClassVar[bool] = False
