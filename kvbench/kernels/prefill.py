"""A prompt's attention statistics, which policies ask for, from the log-sum-exp of its forward (`forward.py`).

They are passes over tiles of QK^T that never store a matrix of queries by keys; none adds up by atomics, so
a result is the same every time. A row's log-sum-exp (`row_lse`) is worked out where the fused forward does not hand it
out: pads, stored entries, float32. From it one pass gives what each entry receives (`column_mass`, which H2O and
Elastic need; it makes half of the forward's products and as many powers of two) and another the rows of a few queries,
reduced to KV heads at once (`window_rows`). The references are the plain branches of `column_mass` and `last_rows` in
`kvbench.cache.attention`.

Block sizes are constants by dtype, head size and length: no search at run time, so results and warm-up do not depend
on what ran before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from kvbench.kernels.dispatch import Chunk, has_tile_loads, in_line, interpreted, on_its_device

if TYPE_CHECKING:
    from triton.tools.tensor_descriptor import TensorDescriptor


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiles:
    """Queries and keys of one tile, warps of a program, and loads in flight.

    described: queries are fetched by the device's unit for tiles (`has_tile_loads`), where it can.
    """

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int
    described: bool = False


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
_LONG_MASS = Tiles(block_q=128, block_k=128, num_warps=4, num_stages=2, described=True)
_LONG_TOKENS = 4096
_LANES = 8  # neighbours in a row of a product, which different threads hold (float32: one thread has the row)
_LOG2_E = tl.constexpr(1.4426950408889634)
_ALIGNED_BYTES = 16


def mass_tiles_for(query: Tensor, entries: int, reduction: str) -> Tiles:
    """Return the block sizes of the walk over queries (B, Hq, Q, D) by blocks of keys.

    Measured on an H200 (docs/log.md). `max` holds two tiles, which leaves no room for larger ones.
    """
    is_long = entries >= _LONG_TOKENS and query.dtype != torch.float32
    return _LONG_MASS if is_long and query.shape[-1] <= 128 and reduction != "max" else tiles_for(query)


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


@triton.jit
def _loaded(states, first, count, step, BLOCK: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return rows `first`.. of the `count` in states, which lie `step` apart: (BLOCK, BLOCK_D), 0 outside."""
    row, d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    tile = states + first * tl.cast(step, tl.int64)
    mask = (first + row < count)[:, None] & (d < WIDTH)[None, :]
    return tl.load(tile + row[:, None] * step + d[None, :], mask=mask, other=0.0)


@triton.jit
def _loaded_across(states, first, count, step, BLOCK: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return the same transposed, (BLOCK_D, BLOCK), as the right side of a product reads it."""
    row, d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    tile = states + first * tl.cast(step, tl.int64)
    mask = (first + row < count)[None, :] & (d < WIDTH)[:, None]
    return tl.load(tile + row[None, :] * step + d[:, None], mask=mask, other=0.0)


@triton.jit
def _stands_at(position, at, count, else_at, PLAIN: tl.constexpr):
    """Return where the tokens number `at` of `count` stand, -1 where none does; if PLAIN that is `else_at`."""
    if PLAIN:
        return else_at
    return tl.load(position + at, mask=at < count, other=-1).to(tl.int32)


@triton.jit
def _sees(held_at, asks_at, PLAIN: tl.constexpr):
    """Return whether queries that stand at `asks_at` see keys that stand at `held_at`; both broadcast to a tile."""
    if PLAIN:
        return held_at <= asks_at
    return (held_at >= 0) & (held_at <= asks_at)


@triton.jit
def _products(left, right, UPCAST: tl.constexpr):
    """Return left (M, D) times right (D, N), accumulated in float32, never in TF32."""
    if UPCAST:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, input_precision="ieee")


@triton.jit
def _logits(left, right, scale, UPCAST: tl.constexpr):
    """Return their products times scale."""
    return _products(left, right, UPCAST) * scale


@triton.jit
def _tile_of_queries(
    walk,
    step,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DESCRIBED: tl.constexpr,
):
    """Return a KV head's tile number `step`: queries (BLOCK_D, BLOCK_Q), their normalisers, their numbers.

    Newest first, so that neighbours read the same queries; of a block one query head of the group after the other.
    """
    query, normaliser, batch, first_head, last_block, query_b, query_h, query_t, queries = walk
    member = step % GROUP
    block = last_block - step // GROUP
    first_query = block * BLOCK_Q
    if DESCRIBED:
        tile = query.load([batch.to(tl.int32), (first_head + member).to(tl.int32), first_query, 0])
        q = tl.trans(tl.reshape(tile, (BLOCK_Q, BLOCK_D)))
    else:
        states = query + batch * query_b + (first_head + member) * query_h
        q = _loaded_across(states, first_query, queries, query_t, BLOCK_Q, WIDTH, BLOCK_D)
    at = tl.cast(member, tl.int64) * (last_block + 1) + block
    return q, tl.load(normaliser + at * BLOCK_Q + tl.arange(0, BLOCK_Q)), first_query + tl.arange(0, BLOCK_Q)


@triton.jit
def _weights(products, scale, normaliser):
    """Return the softmax weights of products (BLOCK_K, BLOCK_Q): a multiplication, a subtraction, a power of two."""
    return tl.exp2(products * scale - normaliser[None, :])


@triton.jit
def _added(total, lost, weights, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, LANES: tl.constexpr):
    """Return the sums per key and lane, and what they are in excess by (Kahan): a long prompt is one long sum.

    Threads that hold neighbours of a row add up by themselves; lanes are added when the walk has ended.
    """
    more = tl.sum(tl.reshape(weights, (BLOCK_K, BLOCK_Q // LANES, LANES)), axis=1) - lost
    larger = total + more
    return larger, (larger - total) - more


@triton.jit(do_not_specialize=["queries", "entries"])
def _column_mass(
    query,
    keys,
    normaliser,
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
    LANES: tl.constexpr,
    DESCRIBED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program owns a block of keys of one KV head and walks the queries that may see it, of all its query heads.

    First the blocks of a plain prompt that see all of these keys, without a mask. Then the others, query by query.

    normaliser (row of queries, its blocks in full): the log-sum-exp as a power of two, +inf where there is no query.
    With DESCRIBED `query` is a descriptor of (B, Hq, Q, D), which gives 0 outside.
    """
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // heads, row % heads
    first_key, stored = tl.program_id(0) * BLOCK_K, entries - queries
    at_k = first_key + tl.arange(0, BLOCK_K)
    k = _loaded(keys + batch * keys_b + head * keys_h, first_key, entries, keys_t, BLOCK_K, WIDTH, BLOCK_D)
    held_at = _stands_at(key_position + batch * position_b + head * position_h, at_k, entries, at_k, PLAIN)
    scale *= _LOG2_E
    first_block = tl.maximum(first_key - stored, 0) // BLOCK_Q
    last_block = tl.cdiv(queries, BLOCK_Q) - 1
    first_head = head * GROUP
    normaliser += row * GROUP * (last_block + 1) * BLOCK_Q
    walk = query, normaliser, batch, first_head, last_block, query_b, query_h, query_t, queries
    whole = 0
    if PLAIN and REDUCTION != "max":
        first_whole = tl.cdiv(tl.maximum(first_key + BLOCK_K - 1 - stored, 0), BLOCK_Q)
        whole = tl.maximum(last_block + 1 - first_whole, 0) * GROUP
    total = tl.zeros((BLOCK_K, LANES), dtype=tl.float32)
    lost = tl.zeros((BLOCK_K, LANES), dtype=tl.float32)
    for step in tl.range(0, whole, num_stages=STAGES):  # said here it holds for normalisers too
        q, norm, _ = _tile_of_queries(walk, step, GROUP, WIDTH, BLOCK_Q, BLOCK_D, DESCRIBED)
        total, lost = _added(total, lost, _weights(_products(k, q, UPCAST), scale, norm), BLOCK_Q, BLOCK_K, LANES)
    if REDUCTION == "max":
        largest = tl.zeros((BLOCK_K, BLOCK_Q), dtype=tl.float32)
    for step in tl.range(whole, (last_block - first_block + 1) * GROUP, num_stages=STAGES):
        q, norm, at_q = _tile_of_queries(walk, step, GROUP, WIDTH, BLOCK_Q, BLOCK_D, DESCRIBED)
        asks_at = _stands_at(query_position + batch * queries, at_q, queries, stored + at_q, PLAIN)
        weights = _weights(_products(k, q, UPCAST), scale, norm)
        weights = tl.where(_sees(held_at[:, None], asks_at[None, :], PLAIN), weights, 0.0)
        if REDUCTION == "max":
            largest = tl.maximum(tl.where(step % GROUP == 0, 0.0, largest), weights)
            weights = tl.where(step % GROUP == GROUP - 1, largest, 0.0)
        total, lost = _added(total, lost, weights, BLOCK_Q, BLOCK_K, LANES)
    received = tl.sum(total, axis=1)
    if REDUCTION == "mean":
        received = received / GROUP
    tl.store(mass + row * entries + at_k, received, mask=at_k < entries)


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
    """One program makes one tile of a KV head's rows; no row per query head is ever stored."""
    row = tl.program_id(2).to(tl.int64)
    batch, head = row // heads, row % heads
    first_key, first_query = tl.program_id(0) * BLOCK_K, tl.program_id(1) * BLOCK_Q
    at_k, at_q = first_key + tl.arange(0, BLOCK_K), first_query + tl.arange(0, BLOCK_Q)
    k = _loaded_across(keys + batch * keys_b + head * keys_h, first_key, entries, keys_t, BLOCK_K, WIDTH, BLOCK_D)
    held_at = _stands_at(key_position + batch * position_b + head * position_h, at_k, entries, at_k, PLAIN)
    asks_at = _stands_at(query_position + batch * queries, at_q, queries, entries - queries + at_q, PLAIN)
    sees = _sees(held_at[None, :], asks_at[:, None], PLAIN)
    result = tl.zeros((BLOCK_Q, BLOCK_K), dtype=tl.float32)
    for member in range(0, GROUP):
        states = query + batch * query_b + (head * GROUP + member) * query_h
        q = _loaded(states, first_query, queries, query_t, BLOCK_Q, WIDTH, BLOCK_D)
        normaliser = tl.load(lse + (row * GROUP + member) * queries + at_q, mask=at_q < queries, other=float("inf"))
        weights = tl.exp(_logits(q, k, scale, UPCAST) - normaliser[:, None])
        weights = tl.where(sees, weights, 0.0)
        if REDUCTION == "max":
            result = tl.maximum(result, weights)
        else:
            result += weights
    if REDUCTION == "mean":
        result = result / GROUP
    stored_at = rows + row * queries * entries + at_q.to(tl.int64)[:, None] * entries + at_k[None, :]
    tl.store(stored_at, result, mask=(at_q < queries)[:, None] & (at_k < entries)[None, :])


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
    """One program owns a block of queries of one head and walks the keys with a running maximum and sum."""
    row = tl.program_id(1).to(tl.int64)
    batch, query_head = row // (heads * GROUP), row % (heads * GROUP)
    head = query_head // GROUP
    first_query, stored = tl.program_id(0) * BLOCK_Q, entries - queries
    at_q = first_query + tl.arange(0, BLOCK_Q)
    states = query + batch * query_b + query_head * query_h
    q = _loaded(states, first_query, queries, query_t, BLOCK_Q, WIDTH, BLOCK_D)
    asks_at = _stands_at(query_position + batch * queries, at_q, queries, stored + at_q, PLAIN)
    end = tl.minimum(entries, stored + first_query + BLOCK_Q)
    peak = tl.full((BLOCK_Q,), -1e30, dtype=tl.float32)
    total = tl.zeros((BLOCK_Q,), dtype=tl.float32)
    for first_key in range(0, end, BLOCK_K):
        at_k = first_key + tl.arange(0, BLOCK_K)
        k = _loaded_across(keys + batch * keys_b + head * keys_h, first_key, entries, keys_t, BLOCK_K, WIDTH, BLOCK_D)
        held_at = _stands_at(key_position + batch * position_b + head * position_h, at_k, entries, at_k, PLAIN)
        sees = _sees(held_at[None, :], asks_at[:, None], PLAIN)
        logits = tl.where(sees, _logits(q, k, scale, UPCAST), -float("inf"))
        higher = tl.maximum(peak, tl.max(logits, axis=1))
        total = total * tl.exp(peak - higher) + tl.sum(tl.exp(logits - higher[:, None]), axis=1)
        peak = higher
    result = tl.where(total > 0, peak + tl.log(tl.where(total > 0, total, 1.0)), float("inf"))
    tl.store(lse + row * queries + at_q, result, mask=at_q < queries)


@on_its_device
def column_mass(chunk: Chunk, reduction: str, lse: Tensor | None = None) -> Tensor:
    """Return (B, H, T) float32: what each entry receives from all queries of the chunk.

    lse (B, Hq, Q) float32, worked out where it is not given; +inf for a query that does not count. The query heads of
    a group are reduced by `mean`, `sum` or `max`, the last per query before queries are summed.
    """
    batch, heads, entries, _ = chunk.keys.shape
    tiles = mass_tiles_for(chunk.query, entries, reduction)
    mass = torch.empty((batch, heads, entries), dtype=torch.float32, device=chunk.keys.device)
    grid = (triton.cdiv(entries, tiles.block_k), batch * heads)
    lse = row_lse(chunk) if lse is None else lse
    missing = -lse.shape[-1] % tiles.block_q
    normaliser = (
        functional.pad(lse, (0, missing), value=torch.inf).mul_(_LOG2_E.value) if missing else lse * _LOG2_E.value
    )
    described = _described(chunk.query, tiles)
    _launch(
        _column_mass[grid],
        chunk,
        tiles,
        mass,
        normaliser.contiguous(),
        described=described,
        DESCRIBED=described is not None,
        STAGES=tiles.num_stages,
        REDUCTION=reduction,
        LANES=1 if chunk.query.dtype == torch.float32 else _LANES,
    )
    return mass


@on_its_device
def window_rows(chunk: Chunk, reduction: str, lse: Tensor | None = None) -> Tensor:
    """Return (B, H, Q, T) float32, the rows of all queries of the chunk; `lse` and `reduction` as in `column_mass`."""
    tiles, queries, (batch, heads, entries, _) = tiles_for(chunk.query), chunk.query.shape[2], chunk.keys.shape
    rows = torch.empty((batch, heads, queries, entries), dtype=torch.float32, device=chunk.keys.device)
    grid = (triton.cdiv(entries, tiles.block_k), triton.cdiv(queries, tiles.block_q), batch * heads)
    lse = row_lse(chunk) if lse is None else lse.contiguous()
    _launch(_window_rows[grid], chunk, tiles, rows, lse, REDUCTION=reduction)
    return rows


@on_its_device
def row_lse(chunk: Chunk) -> Tensor:
    """Return (B, Hq, Q) float32, +inf for a query that sees nothing, so that its weights are zero."""
    tiles, (batch, query_heads, queries, _) = row_tiles_for(chunk.query), chunk.query.shape
    lse = torch.empty((batch, query_heads, queries), dtype=torch.float32, device=chunk.query.device)
    grid = (triton.cdiv(queries, tiles.block_q), batch * query_heads)
    _launch(_row_lse[grid], chunk, tiles, lse)
    return lse


def _launch(
    kernel: Any,
    chunk: Chunk,
    tiles: Tiles,
    written: Tensor,
    *lse: Tensor,
    described: TensorDescriptor | None = None,
    **constants: str | bool | int,
) -> None:
    """Launch one of the three kernels, which writes `written` and may read the rows' log-sum-exp.

    described: what is handed over in place of the queries.
    """
    query, keys, key_position = in_line(chunk.query), in_line(chunk.keys), in_line(chunk.key_position)
    width = query.shape[-1]
    kernel(
        query if described is None else described,
        keys,
        *lse,
        chunk.query_position.contiguous(),
        key_position,
        written,
        *query.stride()[:3],
        *keys.stride()[:3],
        *key_position.stride()[:2],
        keys.shape[1],
        query.shape[2],
        keys.shape[2],
        chunk.scaling,
        GROUP=chunk.group,
        PLAIN=chunk.plain,
        WIDTH=width,
        BLOCK_Q=tiles.block_q,
        BLOCK_K=tiles.block_k,
        BLOCK_D=_block_d(width),
        UPCAST=interpreted() and query.dtype != torch.float32,  # numpy, which interprets, has no bfloat16
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        **constants,
    )


def _block_d(width: int) -> int:
    return max(16, int(triton.next_power_of_2(width)))


def _described(query: Tensor, tiles: Tiles) -> TensorDescriptor | None:
    """Return the queries' tiles as the device's unit for them takes them; None where it cannot, or is not to."""
    if not tiles.described or not has_tile_loads(query.device):
        return None
    steps = query.stride()
    begin_bytes = [query.data_ptr(), *(step * query.element_size() for step in steps[:-1])]
    if steps[-1] != 1 or any(number % _ALIGNED_BYTES for number in begin_bytes):
        return None
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(query, list(query.shape), list(steps), [1, 1, tiles.block_q, _block_d(query.shape[-1])])
