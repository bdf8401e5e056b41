"""What a chunk's attention says about its entries: computed on demand, or taken from a recording."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from kvbench.cache.attend import Chunk, column_mass, last_rows


class Statistics(Protocol):
    """The statistics of one chunk in one layer, reduced to KV heads by `mean`, `sum` or `max`."""

    @property
    def new_tokens(self) -> int:
        """Tokens of the chunk, pads included."""

    def mass(self, reduction: str) -> Tensor:
        """Return (B, H, T) float32: attention each entry receives from all real queries."""

    def last_rows(self, num_queries: int, reduction: str) -> Tensor:
        """Return (B, H, W, T) float32: attention rows of the last W = min(num_queries, Q) queries."""


@dataclass(frozen=True, slots=True)
class ChunkStatistics:
    """Computed from the chunk when asked for; `lse` is what `chunk_attention` returned with the output."""

    chunk: Chunk
    lse: Tensor | None

    @property
    def new_tokens(self) -> int:
        """Tokens of the chunk, pads included."""
        return self.chunk.query.shape[2]

    def mass(self, reduction: str) -> Tensor:
        """Return (B, H, T) float32."""
        return column_mass(self.chunk, reduction, self.lse)

    def last_rows(self, num_queries: int, reduction: str) -> Tensor:
        """Return (B, H, W, T) float32."""
        return last_rows(self.chunk, num_queries, reduction, self.lse)
