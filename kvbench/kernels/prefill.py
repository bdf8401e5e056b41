"""Block sizes of the attention kernels, and the one tile of logits they all start from.

Sizes are constants by dtype and head size: no search at run time, so results and warm-up do not
depend on what ran before.

Attention mass of each entry, summed over queries: one pass over QK^T from the rows' log-sum-exp.

The pass H2O and Elastic need. One program owns a block of keys of one KV head and walks the queries
that may see it, newest first so that neighbours read the same queries; nothing is added up by atomics,
so the result is the same every time. The reference is `kvbench.cache.statistics.column_mass` on the CPU.

Log-sum-exp of attention rows, where the fused forward does not hand it out: pads, stored entries, float32.

One program owns a block of queries of one head and walks the keys with a running maximum and sum.

Attention rows of a few queries, reduced to KV heads at once: no row per query head is ever stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvbench.kernels.dispatch import interpreted


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiles:
    """Queries and keys of one tile, warps of a program, and loads in flight."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


_HALF = {
    64: Tiles(block_q=64, block_k=128, num_warps=4, num_stages=3),
    128: Tiles(block_q=64, block_k=128, num_warps=4, num_stages=3),
    256: Tiles(block_q=64, block_k=64, num_warps=4, num_stages=2),
}
_SINGLE = {
    64: Tiles(block_q=32, block_k=64, num_warps=4, num_stages=2),
    128: Tiles(block_q=32, block_k=64, num_warps=4, num_stages=2),
    256: Tiles(block_q=32, block_k=32, num_warps=4, num_stages=1),
}


def tiles_for(query: Tensor) -> Tiles:
    """Return the block sizes for queries (B, Hq, Q, D)."""
    table = _SINGLE if query.dtype == torch.float32 else _HALF
    return next(tiles for width, tiles in table.items() if query.shape[-1] <= width)


def row_tiles_for(query: Tensor) -> Tiles:
    """Return the block sizes of the walk over keys: in float32 smaller, because its rows do not fit registers else."""
    if query.dtype != torch.float32:
        return tiles_for(query)
    wide = query.shape[-1] > 128
    return Tiles(block_q=16 if wide else 32, block_k=32, num_warps=4 if wide else 8, num_stages=1 if wide else 2)


def padded_width(width: int) -> int:
    """Return the power of two, at least 16, that holds a head."""
    return max(16, int(triton.next_power_of_2(width)))


def upcast(states: Tensor) -> bool:
    """Return whether operands must be float32 before a product: numpy, which interprets, has no bfloat16."""
    return interpreted() and states.dtype != torch.float32


def rows_in_line(states: Tensor) -> Tensor:
    """Return `states` with heads whose numbers lie side by side, which kernels rely on; a copy only if they do not."""
    return states if states.stride(-1) == 1 else states.contiguous()


@triton.jit
def tile_logits(left, right, scale, UPCAST: tl.constexpr):
    """Return left (M, D) times right (D, N) times scale, accumulated in float32, never in TF32."""
    if UPCAST:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, input_precision="ieee") * scale


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
