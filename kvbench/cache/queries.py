"""What queries leave behind for policies that ask for it: the moments of a prompt's, and a ring of the last ones.

Nothing of it is kept or computed unless it is declared: `Needs.MOMENTS`, and `Needs.WINDOW` or `Needs.HEAD_ROWS` in a
policy that plans in blocks. Moments are of queries before rotation, which is taken back; the ring holds them rotated,
as the keys that they meet are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvbench.cache.positions import Rotation

_BLOCK = 1024  # queries that are turned back at once


def query_moments(query: Tensor, position: Tensor, rotation: Rotation, skip_tokens: int) -> tuple[Tensor, Tensor]:
    """Return the mean (B, Hq, D) and covariance (B, Hq, D, D) of unrotated queries, float32.

    query (B, Hq, Q, D), rotated to `position` (B, Q); pads (-1) and a row's first `skip_tokens` tokens do not count.
    Both are over the number of queries; zero where there is none.
    """
    counts = position >= skip_tokens
    number = counts.sum(dim=-1).clamp(min=1)[:, None, None]
    blocks = list(
        zip(query.split(_BLOCK, dim=2), position.split(_BLOCK, dim=1), counts.split(_BLOCK, dim=1), strict=True)
    )

    def unrotated(states: Tensor, at: Tensor, real: Tensor, mean: Tensor) -> Tensor:
        by = -at[:, None].expand(states.shape[:3])
        return (rotation.turn(states.float(), by) - mean[:, :, None]) * real[:, None, :, None]

    zero = torch.zeros_like(query[:, :, 0], dtype=torch.float32)
    mean = torch.stack([unrotated(*block, zero).sum(dim=2) for block in blocks]).sum(dim=0) / number
    covariance = torch.zeros((*mean.shape, mean.shape[-1]), dtype=torch.float32, device=mean.device)
    for block in blocks:
        centred = unrotated(*block, mean)
        covariance += torch.matmul(centred.transpose(-1, -2), centred)
    return mean, covariance / number[..., None]


def rows_of(query: Tensor, position: Tensor, keys: Tensor, key_position: Tensor, scaling: float) -> Tensor:
    """Return (B, H, G, Q, T) float32: the attention rows of each query head over entries not newer than the query.

    query (B, Hq, Q, D) at `position` (B, Q), keys (B, H, T, D) at `key_position` (B, H, T); -1 is a pad or an empty
    slot. Rows of pads are zero, and so is one that sees nothing.
    """
    batch, heads, _, width = keys.shape
    grouped = query.reshape(batch, heads, -1, query.shape[2], width).float()
    logits = torch.matmul(grouped * scaling, keys[:, :, None].float().transpose(-1, -2))
    sees = (key_position >= 0)[:, :, None] & (key_position[:, :, None] <= position[:, None, :, None])
    sees &= (position >= 0)[:, None, :, None]
    logits = logits.masked_fill(~sees[:, :, None], -torch.inf)
    return torch.where(sees.any(dim=-1)[:, :, None, :, None], logits.softmax(dim=-1), 0.0)


@dataclass(kw_only=True, slots=True)
class QueryRing:
    """The last W queries of a layer: queries (B, Hq, W, D), position (B, W) or -1; the oldest is written over.

    Everything changes in place, so that a step can be captured.
    """

    queries: Tensor
    position: Tensor
    scaling: float

    def put(self, query: Tensor, position: Tensor) -> None:
        """Take one query of each row, (B, Hq, 1, D) at `position` (B,)."""
        at = position % self.position.shape[1]
        self.queries.scatter_(2, at[:, None, None, None].expand_as(query), query)
        self.position.scatter_(1, at[:, None], position[:, None])

    def rows(self, keys: Tensor, key_position: Tensor) -> Tensor:
        """Return (B, H, G, W, T): the rows of the queries over what is held now, in the order of tokens."""
        order = self.position.argsort(dim=-1, stable=True)
        queries = self.queries.gather(2, order[:, None, :, None].expand_as(self.queries))
        return rows_of(queries, self.position.gather(1, order), keys, key_position, self.scaling)

    def state(self) -> list[Tensor]:
        """Return what a step changes."""
        return [self.queries, self.position]

    def stored_bytes(self) -> int:
        """Return the bytes of the ring, counted from its storages."""
        return sum(t.untyped_storage().nbytes() for t in self.state())


def ring_after(ring: QueryRing | None, query: Tensor, position: Tensor, size: int, scaling: float) -> QueryRing:
    """Return the ring of `size` after a chunk whose last queries are `query` (B, Hq, Q, D) at `position` (B, Q)."""
    if ring is None:
        empty = query.new_zeros((*query.shape[:2], size, query.shape[3]))
        none = torch.full((query.shape[0], size), -1, dtype=torch.int64, device=query.device)
        ring = QueryRing(queries=empty, position=none, scaling=scaling)
    for number in range(max(0, query.shape[2] - size), query.shape[2]):
        at, one = position[:, number], query[:, :, number : number + 1]
        real = at >= 0
        place = (at % size)[:, None]
        kept = ring.queries.gather(2, place[..., None, None].expand_as(one))
        ring.queries.scatter_(
            2, place[..., None, None].expand_as(one), torch.where(real[:, None, None, None], one, kept)
        )
        before = ring.position.gather(1, place)
        ring.position.scatter_(1, place, torch.where(real[:, None], at[:, None], before))
    return ring
