"""Attention mass of each entry, summed over queries: one pass over QK^T from the rows' log-sum-exp.

The pass H2O and Elastic need. One program owns a block of keys of one KV head and walks the queries
that may see it, newest first so that neighbours read the same queries; nothing is added up by atomics,
so the result is the same every time. The reference is `kvbench.cache.attend.column_mass` on the CPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvbench.kernels.tiles import Tiles, padded_width, rows_in_line, tile_logits, tiles_for, upcast


def column_mass(
    query: Tensor,
    keys: Tensor,
    lse: Tensor,
    *,
    query_position: Tensor,
    key_position: Tensor,
    scaling: float,
    plain: bool,
    reduction: str,
    first_query: int = 0,
    tiles: Tiles | None = None,
) -> Tensor:
    """Return (B, H, T) float32: what each entry receives from the queries `first_query`.. of the chunk.

    query (B, Hq, Q, D); keys (B, H, T, D), the last Q being the queries' own; lse (B, Hq, Q) float32,
    +inf for a query that does not count; query_position (B, Q), key_position (B, H, T), -1 for a pad or
    an empty slot; `plain`: no pads and nothing stored before, positions are not read. The query heads
    of a group are reduced by `mean`, `sum` or `max`, the last per query before queries are summed.
    """
    query, keys = rows_in_line(query[:, :, first_query:]), rows_in_line(keys)
    lse, query_position = lse[..., first_query:].contiguous(), query_position[:, first_query:].contiguous()
    key_position = rows_in_line(key_position)
    batch, heads, entries, width = keys.shape
    tiles = tiles or tiles_for(query)
    mass = torch.empty((batch, heads, entries), dtype=torch.float32, device=keys.device)
    _column_mass[(triton.cdiv(entries, tiles.block_k), batch * heads)](
        query,
        keys,
        lse,
        query_position,
        key_position,
        mass,
        *query.stride()[:3],
        *keys.stride()[:3],
        *key_position.stride()[:2],
        heads,
        query.shape[2],
        entries,
        scaling,
        GROUP=query.shape[1] // heads,
        REDUCTION=reduction,
        PLAIN=plain,
        WIDTH=width,
        BLOCK_Q=tiles.block_q,
        BLOCK_K=tiles.block_k,
        BLOCK_D=padded_width(width),
        UPCAST=upcast(query),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return mass


@triton.jit(do_not_specialize=["queries", "entries"])
def _column_mass(
    query,
    keys,
    lse,
    query_position,
    key_position,
    mass,
    query_b,
    query_h,
    query_t,
    keys_b,
    keys_h,
    keys_t,
    position_b,
    position_h,
    heads,
    queries,
    entries,
    scale,
    GROUP: tl.constexpr,
    REDUCTION: tl.constexpr,
    PLAIN: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // heads, row % heads
    first_key = tl.program_id(0) * BLOCK_K
    key_step, query_step = tl.cast(keys_t, tl.int64), tl.cast(query_t, tl.int64)
    in_k, in_q, in_d = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D)
    at_k = first_key + in_k
    key_exists = at_k < entries
    key_tile = keys + batch * keys_b + head * keys_h + first_key * key_step
    key_mask = key_exists[:, None] & (in_d < WIDTH)[None, :]
    k = tl.load(key_tile + in_k[:, None] * keys_t + in_d[None, :], mask=key_mask, other=0.0)
    if not PLAIN:
        held_at = tl.load(key_position + batch * position_b + head * position_h + at_k, mask=key_exists, other=-1).to(
            tl.int32
        )
    stored = entries - queries
    first_block = tl.maximum(first_key - stored, 0) // BLOCK_Q
    last_block = tl.cdiv(queries, BLOCK_Q) - 1
    total = tl.zeros((BLOCK_K, BLOCK_Q), dtype=tl.float32)
    largest = tl.zeros((BLOCK_K, BLOCK_Q), dtype=tl.float32)
    for step in range(0, (last_block - first_block + 1) * GROUP):
        member = step % GROUP
        first_query = (last_block - step // GROUP) * BLOCK_Q
        at_q = first_query + in_q
        exists = at_q < queries
        query_tile = query + batch * query_b + (head * GROUP + member) * query_h + first_query * query_step
        query_mask = exists[None, :] & (in_d < WIDTH)[:, None]
        q = tl.load(query_tile + in_q[None, :] * query_t + in_d[:, None], mask=query_mask, other=0.0)
        normaliser = tl.load(lse + (row * GROUP + member) * queries + at_q, mask=exists, other=float("inf"))
        if PLAIN:
            sees = at_k[:, None] <= (stored + at_q)[None, :]
        else:
            asks_at = tl.load(query_position + batch * queries + at_q, mask=exists, other=-1).to(tl.int32)
            sees = (held_at >= 0)[:, None] & (held_at[:, None] <= asks_at[None, :])
        weights = tl.exp(tile_logits(k, q, scale, UPCAST) - normaliser[None, :])
        weights = tl.where(sees, weights, 0.0)
        if REDUCTION == "max":
            largest = tl.maximum(tl.where(member == 0, 0.0, largest), weights)
            total += tl.where(member == GROUP - 1, largest, 0.0)
        else:
            total += weights
    received = tl.sum(total, axis=1)
    if REDUCTION == "mean":
        received = received / GROUP
    tl.store(mass + row * entries + at_k, received, mask=key_exists)
