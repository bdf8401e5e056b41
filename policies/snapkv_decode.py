"""SnapKV again and again while tokens are generated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from kvbench.cache import Needs, ScorePolicy, View, When
from kvbench.cache.selection import pooled
from kvbench.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SnapKVDecode(ScorePolicy):
    """SnapKV's choice after the prompt, and anew each time that `every_tokens` more tokens are held.

    Source: SnapKV-D of Hold Onto That Thought: Assessing KV Cache Compression On Reasoning (arXiv 2512.12008):
    SnapKV's score (arXiv 2404.14469, Sec. 4) of the last `num_recent` queries over all that is held, generated
    tokens included. The queries are kept in a ring, whose bytes are counted. Differs in: the window and the pooling
    are SnapKV's own, and a block is the 128 tokens of R-KV, where the study takes the sizes of its harness.
    """

    needs: ClassVar[Needs] = Needs.WINDOW
    window_tokens: ClassVar[int] = 32

    num_recent: int = 32
    kernel_tokens: int = 7
    pooling: Literal["max", "avg"] = "max"
    every_tokens: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.num_recent <= self.window_tokens:
            raise ConfigError(f"policy.num_recent is {self.num_recent}; it must lie in 1 to {self.window_tokens}")
        if self.kernel_tokens < 1 or self.kernel_tokens % 2 == 0:
            raise ConfigError(f"policy.kernel_tokens is {self.kernel_tokens}; it must be odd and at least 1")
        if self.pooling not in ("max", "avg"):
            raise ConfigError(f"policy.pooling is {self.pooling!r}; it must be 'max' or 'avg'")
        if self.every_tokens < 2 and When.DECODE in self.when:
            raise ConfigError(
                f"policy.every_tokens is {self.every_tokens}; rows of the last queries are there where a block of 2 or "
                "more tokens is cut"
            )

    def score(self, view: View) -> Tensor:
        """Return the pooled attention of the last queries, neighbours counted by age."""
        in_window = view.position >= (view.seen - self.num_recent)[:, None, None]
        votes = view.window[:, :, -self.num_recent :].sum(dim=2).masked_fill(in_window, 0.0)
        return pooled(votes, view.position, self.kernel_tokens, self.pooling)
