"""How many entries a layer may hold now: one definition for every policy.

A budget counts entries per layer and KV head, with sinks, recent tokens and anchors included.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from kvbench.errors import ConfigError

_DECIMALS = 9  # 0.29 * 100 is 28.999999999999996; the user meant 29


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """Entries allowed: a `fraction` of the tokens seen so far or of the prompt, or absolute `tokens`.

    `of="seen"` grows while tokens are generated, as in Elastic Cache (arXiv 2407.18121, Sec. 3.3);
    `of="prompt"` is fixed after prefill. Raises: ConfigError for values out of range.
    """

    fraction: float | None = None
    tokens: int | None = None
    of: Literal["seen", "prompt"] = "seen"

    def __post_init__(self) -> None:
        if (self.fraction is None) == (self.tokens is None):
            raise ConfigError(
                f"budget.fraction is {self.fraction} and budget.tokens is {self.tokens}; exactly one must be given. "
                "Use budget=tokens budget.tokens=128 for an absolute size, budget.fraction=0.2 for a share"
            )
        if self.fraction is not None and not 0.0 < self.fraction <= 1.0:
            raise ConfigError(
                f"budget.fraction is {self.fraction:g}; it must lie in (0, 1]. "
                "Use budget=tokens budget.tokens=128 to give an absolute size"
            )
        if self.tokens is not None and self.tokens < 1:
            raise ConfigError(f"budget.tokens is {self.tokens}; it must be at least 1")
        if self.of not in ("seen", "prompt"):
            raise ConfigError(f"budget.of is {self.of!r}; it must be 'seen' or 'prompt'")

    def entries(self, *, seen_tokens: int, prompt_tokens: int) -> int:
        """Return the entries allowed after `seen_tokens`, at least 1; fractions round down."""
        if self.tokens is not None:
            return self.tokens
        assert self.fraction is not None
        base = seen_tokens if self.of == "seen" else prompt_tokens
        return max(1, math.floor(round(self.fraction * base, _DECIMALS)))

    def entries_as_released(self, *, seen_tokens: int, prompt_tokens: int) -> int:
        """Return the entries allowed as Elastic Cache's code counts them: rounded up, in its own arithmetic.

        It takes the pruned share r, keeps 1 - r in floating point, and cuts the tokens to forget down to
        a whole number; 1 - 0.7 is a little more than 0.3, which shows at multiples of ten.
        """
        if self.fraction is None:
            return self.entries(seen_tokens=seen_tokens, prompt_tokens=prompt_tokens)
        kept = 1 - round(1 - self.fraction, _DECIMALS)
        if seen_tokens == prompt_tokens:
            return max(1, seen_tokens - int(seen_tokens - seen_tokens * kept))
        return max(1, math.ceil((seen_tokens if self.of == "seen" else prompt_tokens) * kept))

    def describe(self) -> str:
        """Return the budget in words, as tables print it."""
        if self.tokens is not None:
            return f"{self.tokens} tokens"
        assert self.fraction is not None
        return f"{100 * self.fraction:g} % of {self.of}"


UNLIMITED = Budget(fraction=1.0)
