"""Position modes: where a new token stands relative to what is left in the cache.

`original`: every token at its true position. `in_cache`: positions are ranks inside the cache, as
StreamingLLM defines them (arXiv 2309.17453, Sec. 3.2). Stored keys never change; a temporary copy
is turned for the step that needs it. `released`: as Elastic Cache's code has it. Prompt tokens stand
where they are; a later token stands at the number of entries that the first layer held when it came,
for query and key alike and for good. So after an eviction it stands before much of the context, and
several tokens share a place.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from torch import Tensor

from kvbench.cache.attend import Chunk
from kvbench.cache.rotation import Rotation
from kvbench.cache.selection import age_rank

PositionMode = Literal["original", "in_cache", "released"]
POSITION_MODES: tuple[str, ...] = get_args(PositionMode)


@dataclass(kw_only=True, slots=True)
class Places:
    """Where the tokens of a pass stand in positions=released; one object for the layers of a cache.

    transformers 4.31, which that code ran on, takes the length of the first layer's cache for the
    position of a new token in every layer. `by` (B,) is that length minus the true position.
    """

    rotation: Rotation
    by: Tensor | None = None

    def arrive(self, keys: Tensor, layer: int, length: Tensor, seen: Tensor) -> Tensor:
        """Return new keys (B, H, Q, D) where they stand from now on.

        length (B, H) is what the layer holds and seen (B,) what came, both before these tokens.
        """
        if layer == 0 or self.by is None:
            self.by = length.amax(dim=-1) - seen
        return self.turned(keys)

    def turned(self, states: Tensor) -> Tensor:
        """Return the states (B, H, Q, D) of the tokens that arrived last where these stand."""
        assert self.by is not None
        return self.rotation.turn(states, self.by[:, None, None].expand(states.shape[:3]))


def shifted_step(query: Tensor, keys: Tensor, position: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor]:
    """Return query (B, Hq, 1, D) and keys (B, H, C, D) at their ranks; as they are without a rotation."""
    if rotation is None:
        return query, keys
    last_rank = (position >= 0).sum(dim=-1) - 1
    batch, heads, _, width = keys.shape
    grouped = query.reshape(batch, heads, -1, width)
    turned = rotation.turn(grouped, (last_rank - position.amax(dim=-1))[..., None])
    return turned.reshape(query.shape), rotation.turn(keys, age_rank(position) - position)


def shifted_chunk(chunk: Chunk, rotation: Rotation | None) -> Chunk:
    """Return a chunk whose stored and new tokens stand at their ranks; as it is without a rotation."""
    if rotation is None or chunk.stored == 0:
        return chunk
    by = age_rank(chunk.key_position) - chunk.key_position
    query_by = by[..., chunk.stored :].repeat_interleave(chunk.group, dim=1)
    return replace(chunk, query=rotation.turn(chunk.query, query_by), keys=rotation.turn(chunk.keys, by))
