"""Log-sum-exp of attention rows, where the fused forward does not hand it out: pads, stored entries, float32.

One program owns a block of queries of one head and walks the keys with a running maximum and sum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvbench.kernels.tiles import Tiles, padded_width, row_tiles_for, rows_in_line, tile_logits, upcast


def row_lse(
    query: Tensor,
    keys: Tensor,
    *,
    query_position: Tensor,
    key_position: Tensor,
    scaling: float,
    plain: bool,
    tiles: Tiles | None = None,
) -> Tensor:
    """Return (B, Hq, Q) float32, +inf for a query that sees nothing, so that its weights are zero.

    query (B, Hq, Q, D); keys (B, H, T, D), the last Q being the queries' own; query_position (B, Q),
    key_position (B, H, T), -1 for a pad or an empty slot; `plain`: no pads and nothing but the prompt's
    own tokens before, positions are not read.
    """
    query, keys, key_position = rows_in_line(query), rows_in_line(keys), rows_in_line(key_position)
    batch, query_heads, queries, width = query.shape
    _, heads, entries, _ = keys.shape
    tiles = tiles or row_tiles_for(query)
    lse = torch.empty((batch, query_heads, queries), dtype=torch.float32, device=query.device)
    _row_lse[(triton.cdiv(queries, tiles.block_q), batch * query_heads)](
        query,
        keys,
        query_position.contiguous(),
        key_position,
        lse,
        *query.stride()[:3],
        *keys.stride()[:3],
        *key_position.stride()[:2],
        heads,
        queries,
        entries,
        scaling,
        GROUP=query_heads // heads,
        PLAIN=plain,
        WIDTH=width,
        BLOCK_Q=tiles.block_q,
        BLOCK_K=tiles.block_k,
        BLOCK_D=padded_width(width),
        UPCAST=upcast(query),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return lse


@triton.jit(do_not_specialize=["queries", "entries"])
def _row_lse(
    query,
    keys,
    query_position,
    key_position,
    lse,
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
    PLAIN: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    batch, query_head = row // (heads * GROUP), row % (heads * GROUP)
    head = query_head // GROUP
    first_query = tl.program_id(0) * BLOCK_Q
    key_step, query_step = tl.cast(keys_t, tl.int64), tl.cast(query_t, tl.int64)
    in_k, in_q, in_d = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D)
    at_q = first_query + in_q
    exists = at_q < queries
    query_tile = query + batch * query_b + query_head * query_h + first_query * query_step
    query_mask = exists[:, None] & (in_d < WIDTH)[None, :]
    q = tl.load(query_tile + in_q[:, None] * query_t + in_d[None, :], mask=query_mask, other=0.0)
    if not PLAIN:
        asks_at = tl.load(query_position + batch * queries + at_q, mask=exists, other=-1).to(tl.int32)
    stored = entries - queries
    end = tl.minimum(entries, stored + first_query + BLOCK_Q)
    peak = tl.full((BLOCK_Q,), -1e30, dtype=tl.float32)
    total = tl.zeros((BLOCK_Q,), dtype=tl.float32)
    for first_key in range(0, end, BLOCK_K):
        at_k = first_key + in_k
        key_exists = at_k < entries
        key_tile = keys + batch * keys_b + head * keys_h + first_key * key_step
        key_mask = key_exists[None, :] & (in_d < WIDTH)[:, None]
        k = tl.load(key_tile + in_k[None, :] * keys_t + in_d[:, None], mask=key_mask, other=0.0)
        if PLAIN:
            sees = (at_k[None, :] <= (stored + at_q)[:, None]) & key_exists[None, :]
        else:
            held_at = tl.load(
                key_position + batch * position_b + head * position_h + at_k, mask=key_exists, other=-1
            ).to(tl.int32)
            sees = (held_at >= 0)[None, :] & (held_at[None, :] <= asks_at[:, None])
        logits = tl.where(sees, tile_logits(q, k, scale, UPCAST), -float("inf"))
        higher = tl.maximum(peak, tl.max(logits, axis=1))
        total = total * tl.exp(peak - higher) + tl.sum(tl.exp(logits - higher[:, None]), axis=1)
        peak = higher
    result = tl.where(total > 0, peak + tl.log(tl.where(total > 0, total, 1.0)), float("inf"))
    tl.store(lse + row * queries + at_q, result, mask=exists)
