"""Attention under a `PolicyCache`: what transformers calls, the output, and the statistics that policies ask for.

The function is registered through the public `AttentionInterface` and set on the **text** config only: on a whole
vision-language model it would make the vision tower causal, silently. Under the same name a mask function hands the
plain (B, seen) padding mask through; causality and validity are decided per layer, here, by positions: a query at p
sees the entries held at positions 0..p. What is not implemented is refused.

The output always comes from the fused kernel, whatever the policy, so prefill logits do not depend on it; statistics
are one extra pass over blocks of queries, in plain torch or by the kernels, and nothing is of size n x n. Hq query
heads share H KV heads in groups of G.

Queries leave behind the moments of a prompt's, and a ring of the last ones. Nothing of it is kept or computed unless it
is declared: `Needs.MOMENTS`, and `Needs.WINDOW` or `Needs.HEAD_ROWS` in a policy that plans in blocks. Moments are of
queries before rotation, which is taken back; the ring holds them rotated, as the keys that they meet are.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, AttentionMaskInterface, Cache
from transformers.masking_utils import causal_mask_function, create_causal_mask

from kvbench.cache.positions import Rotation
from kvbench.errors import ModelSupportError
from kvbench.kernels.dispatch import MAX_WIDTH, Chunk, use_triton

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


ATTENTION_NAME = "kvbench"
LAYER_TAG = "kvbench_layer"
CACHE_NAMES = ("cache", "past_key_values")  # since transformers 5.24, and before
CACHE_NAME = next(name for name in CACHE_NAMES if name in inspect.signature(create_causal_mask).parameters)
"""What the installed transformers calls a cache, in arguments and in outputs."""
_REFUSED = ("softcap", "sliding_window", "s_aux", "position_bias", "head_mask")
_REDUCTIONS: dict[str, Callable[..., Tensor]] = {"mean": torch.mean, "sum": torch.sum, "max": torch.amax}
_BLOCK_BYTES = 64 * 2**20
_MAX_BLOCK_QUERIES = 256


def attach(model: Any) -> None:
    """Switch the text part of `model` to kvbench's attention, so that a `PolicyCache` can be passed.

    The vision tower keeps its own. Raises: ModelSupportError if the text part has no switch.
    """
    text_config = model.config.get_text_config()
    layer_types = set(getattr(text_config, "layer_types", None) or ["full_attention"])
    if layer_types != {"full_attention"}:
        raise ModelSupportError(
            f"{type(model).__name__} mixes layer types {sorted(layer_types)}; kvbench supports full attention only"
        )
    nested = text_config is not model.config
    model.set_attn_implementation({"text_config": ATTENTION_NAME} if nested else ATTENTION_NAME)


def cache_argument(model: Any, cache: Any) -> dict[str, Any]:
    """Return `cache` as the keyword argument that `model` and its `generate` take it by.

    It is transformers' own name where the forward takes both. Raises: ModelSupportError for a forward that takes none.
    """
    parameters = inspect.signature(type(model).forward).parameters
    for name in (CACHE_NAME, *CACHE_NAMES):
        if name in parameters:
            return {name: cache}
    raise ModelSupportError(
        f"{type(model).__name__}.forward takes no cache under {' or '.join(CACHE_NAMES)}; kvbench cannot hand it one"
    )


class _Listener(Protocol):
    arriving: Tensor | None


def listen(model: Any, cache: Cache, layers: Sequence[_Listener]) -> None:
    """Let each of `layers`, those of `cache`, know what its attention is given, as long as the cache lives.

    No attention function is told it, so the modules are asked: only for caches that want it, and other caches of the
    same model are left alone. Raises: ModelSupportError where the modules are not found under a usual name.
    """
    decoder, told = model.get_decoder(), weakref.ref(cache)
    names = (("layers", "self_attn"), ("h", "attn"))
    blocks, name = next(((getattr(decoder, many), one) for many, one in names if hasattr(decoder, many)), ((), ""))
    modules = [module for module in (getattr(block, name, None) for block in blocks) if isinstance(module, nn.Module)]
    if len(modules) != len(layers):
        raise ModelSupportError(
            f"{type(model).__name__} has no attention under layers.N.self_attn, whose hidden states this policy reads; "
            "use another policy or model"
        )
    hooks = [
        module.register_forward_pre_hook(partial(_tell, told, layer), with_kwargs=True)
        for module, layer in zip(modules, layers, strict=True)
    ]
    weakref.finalize(cache, _stop, hooks).atexit = False


def _tell(
    cache: weakref.ref[Cache], layer: _Listener, module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]
) -> None:
    owner = cache()
    if owner is not None and any(one is owner for one in (*named.values(), *given)):
        layer.arriving = named.get("hidden_states", given[0] if given else None)


def _stop(hooks: list[RemovableHandle]) -> None:
    for hook in hooks:
        hook.remove()


def is_attached(config: Any) -> bool:
    """Return whether `attach` was called on the model of this config."""
    return bool(config.get_text_config()._attn_implementation == ATTENTION_NAME)


def kvbench_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend under the layer that `key` is tagged with; without a cache, plain causal attention.

    query (B, Hq, Q, D), key, value as `PolicyLayer.update` returned them, attention_mask (B, seen)
    or None. Returns (B, Q, Hq, D) and None. Raises: ModelSupportError.
    """
    _refuse_unsupported(module, attention_mask, dropout, kwargs)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    tag = getattr(key, LAYER_TAG, None)
    if tag is not None:
        output = tag().attend(query, key, value, scale, attention_mask)
    else:
        output = _without_cache(query, key, value, scale, attention_mask)
    return output.transpose(1, 2), None


def padding_mask(*, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """Hand the (B, seen) padding mask through, None when there is none.

    Raises: ModelSupportError for a mask that is not plain causal, which transformers tells here only.
    """
    if kwargs.get("mask_function", causal_mask_function) is not causal_mask_function:
        raise ModelSupportError(
            "the mask is not plain causal (packed sequences, image tokens that see each other, a sliding window); "
            "kvbench attention does not implement it. Give every sequence its own row"
        )
    return attention_mask


def _refuse_unsupported(module: nn.Module, mask: Tensor | None, dropout: float, kwargs: dict[str, Any]) -> None:
    used = [name for name in _REFUSED if kwargs.get(name) is not None]
    if dropout:
        used.append(f"dropout={dropout} (call model.eval())")
    if not getattr(module, "is_causal", True):
        used.append("attention that is not causal")
    if mask is not None and mask.ndim != 2:
        used.append(f"a {mask.ndim}-dimensional attention mask (give the (B, seen) padding mask)")
    if used:
        raise ModelSupportError(f"{type(module).__name__} uses {', '.join(used)}; kvbench does not implement it")


def _without_cache(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    batch, _, new, _ = query.shape
    if key.shape[2] != new:
        raise ModelSupportError(
            f"attention got {key.shape[2]} keys for {new} queries from a cache that is not kvbench's; "
            "pass **cache_argument(model, PolicyCache(model, policy, budget)), or use_cache=False"
        )
    real = mask.bool() if mask is not None else torch.ones((batch, new), dtype=torch.bool, device=query.device)
    position = torch.where(real, real.long().cumsum(-1) - 1, -1)
    key_position = position[:, None].expand(batch, key.shape[1], new)
    plain = mask is None or bool(real.all())
    output, _ = chunk_attention(
        Chunk(
            query=query,
            keys=key,
            values=value,
            query_position=position,
            key_position=key_position,
            scaling=scale,
            plain=plain,
            left_pads=None if plain else _left_pads(position),
        ),
        wants_lse=False,
    )
    return output


AttentionInterface.register(ATTENTION_NAME, kvbench_attention)
AttentionMaskInterface.register(ATTENTION_NAME, padding_mask)


def chunk_attention(chunk: Chunk, *, wants_lse: bool) -> tuple[Tensor, Tensor | None]:
    """Return the output (B, Hq, Q, D) and, where statistics run in kernels, the rows' log-sum-exp (B, Hq, Q).

    Which kernel makes the output does not depend on `wants_lse`, so logits do not depend on the policy.
    """
    if use_triton(chunk.query):
        from kvbench.kernels import forward, prefill

        states = (chunk.query, chunk.keys, chunk.values, chunk.scaling)
        takes = chunk.stored == 0 and forward.flash_takes(chunk.query)
        if takes and chunk.plain:
            return forward.causal_forward(*states)
        pads = chunk.left_pads if takes else None
        if pads is not None:
            return forward.padded_forward(*states, pads)
        if wants_lse and _in_kernels(chunk):
            return chunk_output(chunk), prefill.row_lse(chunk)
    return chunk_output(chunk), None


def _left_pads(position: Tensor) -> tuple[int, ...] | None:
    """Return the pads of each row of `position` (B, Q), None if some stand elsewhere than left of all tokens."""
    pads = position < 0
    counts = pads.sum(dim=-1)
    leading = pads.long().cumprod(dim=-1).sum(dim=-1)
    left, all_of_them = torch.stack((leading, counts)).tolist()
    return tuple(left) if left == all_of_them else None


def chunk_output(chunk: Chunk) -> Tensor:
    """Return the attention output (B, Hq, Q, D) of the public fused function."""
    grouped = chunk.group > 1
    if chunk.plain:
        return functional.scaled_dot_product_attention(
            chunk.query, chunk.keys, chunk.values, is_causal=True, scale=chunk.scaling, enable_gqa=grouped
        )
    outputs = [
        functional.scaled_dot_product_attention(
            chunk.query[:, :, start:end],
            chunk.keys[:, :, : chunk.stored + end],
            chunk.values[:, :, : chunk.stored + end],
            attn_mask=_sees(chunk, start, end).repeat_interleave(chunk.group, dim=1),
            scale=chunk.scaling,
            enable_gqa=grouped,
        )
        for start, end in _query_blocks(chunk)
    ]
    return torch.cat(outputs, dim=2)


def column_mass(chunk: Chunk, reduction: str, lse: Tensor | None = None) -> Tensor:
    """Return (B, H, T) float32: attention each entry receives from all real queries of the chunk.

    `lse` is what `chunk_attention` returned; kernels work it out where it is not given.
    """
    if _in_kernels(chunk):
        from kvbench.kernels import prefill

        return prefill.column_mass(chunk, reduction, lse)
    mass = torch.zeros(chunk.key_position.shape, dtype=torch.float32, device=chunk.keys.device)
    for start, end in _query_blocks(chunk):
        rows = reduce_group(_probabilities(chunk, start, end), reduction)
        mass[:, :, : chunk.stored + end] += rows.sum(dim=2)
    return mass


def column_peak(chunk: Chunk, query_weight: Tensor | None = None, key_weight: Tensor | None = None) -> Tensor:
    """Return (B, H, T) float32: the largest attention each entry receives from any real query of any query head.

    query_weight (B, Q) and key_weight (B, H, G, T): by what attention is multiplied first, where they are given.
    """
    peak = torch.zeros(chunk.key_position.shape, dtype=torch.float32, device=chunk.keys.device)
    for start, end in _query_blocks(chunk):
        rows = _probabilities(chunk, start, end)
        if query_weight is not None:
            rows = rows * query_weight[:, None, None, start:end, None]
        if key_weight is not None:
            rows = rows * key_weight[:, :, :, None, : rows.shape[-1]]
        rows = rows.amax(dim=(2, 3)).float()
        seen = peak[:, :, : chunk.stored + end]
        torch.maximum(seen, rows, out=seen)
    return peak


def last_rows(chunk: Chunk, num_queries: int, reduction: str, lse: Tensor | None = None) -> Tensor:
    """Return (B, H, W, T) float32: attention rows of the chunk's last W = min(num_queries, Q) queries.

    `lse` as in `column_mass`.
    """
    end = chunk.query.shape[2]
    start = max(0, end - num_queries)
    if _in_kernels(chunk):
        from kvbench.kernels import prefill

        tail = replace(chunk, query=chunk.query[:, :, start:], query_position=chunk.query_position[:, start:])
        return prefill.window_rows(tail, reduction, None if lse is None else lse[..., start:])
    return reduce_group(_probabilities(chunk, start, end), reduction)


def _in_kernels(chunk: Chunk) -> bool:
    return use_triton(chunk.query) and chunk.query.dtype == chunk.keys.dtype and chunk.query.shape[-1] <= MAX_WIDTH


def decode_step(query: Tensor, keys: Tensor, values: Tensor, valid: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """One new token over the slots: query (B, Hq, 1, D) -> output (B, Hq, 1, D), rows (B, H, G, T), float32 or wider.

    The row of probabilities is what the output is made of, so a policy that wants it pays nothing.
    """
    batch, heads, _, width = keys.shape
    grouped = query.reshape(batch, heads, -1, width)
    logits = torch.matmul(_at_least_float32(grouped) * scaling, _at_least_float32(keys).transpose(-1, -2))
    rows = logits.masked_fill_(~valid[:, :, None], -torch.inf).softmax(dim=-1)
    output = torch.matmul(rows.to(values.dtype), values)
    return output.reshape(batch, -1, 1, width), rows


def reduce_group(rows: Tensor, reduction: str) -> Tensor:
    """Reduce the query heads of a group, dimension 2, to their KV head by `mean`, `sum` or `max`."""
    return _REDUCTIONS[reduction](rows, dim=2)


def _at_least_float32(states: Tensor) -> Tensor:
    return states if states.dtype == torch.float64 else states.float()


def _query_blocks(chunk: Chunk) -> Iterator[tuple[int, int]]:
    """Cut the queries so that one block of float32 rows stays under 64 MiB, or is a single query."""
    batch, heads, queries, _ = chunk.query.shape
    row_bytes = 4 * batch * heads * chunk.keys.shape[2]
    size = max(1, min(_MAX_BLOCK_QUERIES, _BLOCK_BYTES // row_bytes))
    for start in range(0, queries, size):
        yield start, min(start + size, queries)


def _sees(chunk: Chunk, start: int, end: int) -> Tensor:
    """(B, H, q, T') bool; a pad query sees itself only, so that its unused row is finite."""
    query_position = chunk.query_position[:, None, start:end, None]
    key_position = chunk.key_position[:, :, None, : chunk.stored + end]
    sees = (key_position >= 0) & (key_position <= query_position)
    own = torch.arange(chunk.stored + start, chunk.stored + end, device=sees.device)
    itself = own[:, None] == torch.arange(chunk.stored + end, device=sees.device)
    return sees | (itself & (query_position < 0))


def _probabilities(chunk: Chunk, start: int, end: int) -> Tensor:
    """(B, H, G, q, T') float32 softmax rows of a block of queries; rows of pads are zero."""
    batch, _, _, width = chunk.query.shape
    heads = chunk.keys.shape[1]
    query = chunk.query[:, :, start:end].reshape(batch, heads, chunk.group, end - start, width)
    keys = chunk.keys[:, :, None, : chunk.stored + end]
    logits = torch.matmul(_at_least_float32(query) * chunk.scaling, _at_least_float32(keys).transpose(-1, -2))
    logits.masked_fill_(~_sees(chunk, start, end)[:, :, None], -torch.inf)
    real = (chunk.query_position[:, start:end] >= 0)[:, None, None, :, None]
    return logits.softmax(dim=-1) * real


class Statistics(Protocol):
    """The statistics of one chunk in one layer, reduced to KV heads by `mean`, `sum` or `max` where one is named."""

    def mass(self, reduction: str) -> Tensor:
        """Return (B, H, T) float32: attention each entry receives from all real queries."""

    def last_rows(self, num_queries: int, reduction: str) -> Tensor:
        """Return (B, H, W, T) float32: attention rows of the last W = min(num_queries, Q) queries."""

    def head_rows(self, num_queries: int) -> Tensor:
        """Return (B, H, G, W, T) float32: the same rows of each query head."""

    def moments(self, rotation: Rotation, skip_tokens: int) -> tuple[Tensor, Tensor]:
        """Return mean (B, H, G, D) and covariance (B, H, G, D, D) of the chunk's queries before rotation."""

    def last_queries(self, num_queries: int) -> tuple[Tensor, Tensor, float]:
        """Return the last W queries (B, Hq, W, D), their positions (B, W), and the scaling of their products."""


@dataclass(frozen=True, slots=True)
class ChunkStatistics:
    """Computed from the chunk when asked for; `lse` is what `chunk_attention` returned with the output.

    query: that of the chunk as the model rotated it, where the chunk's own was turned to another place.
    """

    chunk: Chunk
    lse: Tensor | None
    query: Tensor | None = None

    def mass(self, reduction: str) -> Tensor:
        """Return (B, H, T) float32."""
        return column_mass(self.chunk, reduction, self.lse)

    def last_rows(self, num_queries: int, reduction: str) -> Tensor:
        """Return (B, H, W, T) float32."""
        return last_rows(self.chunk, num_queries, reduction, self.lse)

    def head_rows(self, num_queries: int) -> Tensor:
        """Return (B, H, G, W, T) float32."""
        end = self.chunk.query.shape[2]
        return _probabilities(self.chunk, max(0, end - num_queries), end)

    def moments(self, rotation: Rotation, skip_tokens: int) -> tuple[Tensor, Tensor]:
        """Return (B, H, G, D) and (B, H, G, D, D) float32."""
        query = self.chunk.query if self.query is None else self.query
        found = query_moments(query, self.chunk.query_position, rotation, skip_tokens)
        mean, covariance = (one.unflatten(1, (-1, self.chunk.group)) for one in found)
        return mean, covariance

    def last_queries(self, num_queries: int) -> tuple[Tensor, Tensor, float]:
        """Return (B, Hq, W, D), (B, W) and the scaling."""
        chunk = self.chunk
        return chunk.query[:, :, -num_queries:], chunk.query_position[:, -num_queries:], chunk.scaling
