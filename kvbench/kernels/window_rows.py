"""Attention rows of a few queries, reduced to KV heads at once: no row per query head is ever stored."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvbench.kernels.tiles import Tiles, padded_width, rows_in_line, tile_logits, tiles_for, upcast


def window_rows(
    query: Tensor,
    keys: Tensor,
    lse: Tensor,
    *,
    query_position: Tensor,
    key_position: Tensor,
    scaling: float,
    plain: bool,
    reduction: str,
    tiles: Tiles | None = None,
) -> Tensor:
    """Return (B, H, W, T) float32, the rows of queries (B, Hq, W, D); the rest as for `column_mass`."""
    query, keys, key_position = rows_in_line(query), rows_in_line(keys), rows_in_line(key_position)
    batch, heads, entries, width = keys.shape
    queries = query.shape[2]
    tiles = tiles or tiles_for(query)
    rows = torch.empty((batch, heads, queries, entries), dtype=torch.float32, device=keys.device)
    _window_rows[(triton.cdiv(entries, tiles.block_k), triton.cdiv(queries, tiles.block_q), batch * heads)](
        query,
        keys,
        lse.contiguous(),
        query_position.contiguous(),
        key_position,
        rows,
        *query.stride()[:3],
        *keys.stride()[:3],
        *key_position.stride()[:2],
        heads,
        queries,
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
    return rows


@triton.jit(do_not_specialize=["queries", "entries"])
def _window_rows(
    query,
    keys,
    lse,
    query_position,
    key_position,
    rows,
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
    row = tl.program_id(2).to(tl.int64)
    batch, head = row // heads, row % heads
    first_key, first_query = tl.program_id(0) * BLOCK_K, tl.program_id(1) * BLOCK_Q
    key_step, query_step = tl.cast(keys_t, tl.int64), tl.cast(query_t, tl.int64)
    in_k, in_q, in_d = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D)
    at_k, at_q = first_key + in_k, first_query + in_q
    key_exists, exists = at_k < entries, at_q < queries
    key_tile = keys + batch * keys_b + head * keys_h + first_key * key_step
    key_mask = key_exists[None, :] & (in_d < WIDTH)[:, None]
    k = tl.load(key_tile + in_k[None, :] * keys_t + in_d[:, None], mask=key_mask, other=0.0)
    if PLAIN:
        sees = at_k[None, :] <= (entries - queries + at_q)[:, None]
    else:
        held_at = tl.load(key_position + batch * position_b + head * position_h + at_k, mask=key_exists, other=-1).to(
            tl.int32
        )
        asks_at = tl.load(query_position + batch * queries + at_q, mask=exists, other=-1).to(tl.int32)
        sees = (held_at >= 0)[None, :] & (held_at[None, :] <= asks_at[:, None])
    result = tl.zeros((BLOCK_Q, BLOCK_K), dtype=tl.float32)
    for member in range(0, GROUP):
        query_tile = query + batch * query_b + (head * GROUP + member) * query_h + first_query * query_step
        query_mask = exists[:, None] & (in_d < WIDTH)[None, :]
        q = tl.load(query_tile + in_q[:, None] * query_t + in_d[None, :], mask=query_mask, other=0.0)
        normaliser = tl.load(lse + (row * GROUP + member) * queries + at_q, mask=exists, other=float("inf"))
        weights = tl.exp(tile_logits(q, k, scale, UPCAST) - normaliser[:, None])
        weights = tl.where(sees, weights, 0.0)
        if REDUCTION == "max":
            result = tl.maximum(result, weights)
        else:
            result += weights
    if REDUCTION == "mean":
        result = result / GROUP
    stored_at = rows + row * queries * entries + at_q.to(tl.int64)[:, None] * entries + at_k[None, :]
    tl.store(stored_at, result, mask=exists[:, None] & key_exists[None, :])
