"""Position modes: where a new token stands relative to what is left in the cache.

`original`: every token at its true position. `in_cache`: positions are ranks inside the cache, as
StreamingLLM defines them (arXiv 2309.17453, Sec. 3.2). Stored keys never change; a temporary copy
is turned for the step that needs it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

from torch import Tensor

from kvbench.cache.attend import Chunk
from kvbench.cache.rotation import Rotation
from kvbench.cache.selection import age_rank

PositionMode = Literal["original", "in_cache"]
POSITION_MODES: tuple[str, ...] = get_args(PositionMode)


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
