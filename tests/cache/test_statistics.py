"""Attention and its statistics against a float64 softmax written with loops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvbench.cache import statistics as attend
from kvbench.cache.statistics import Chunk, chunk_output, column_mass, decode_step, last_rows, reduce_group
from tests.covering import share_of

REDUCE: dict[str, Any] = {"mean": lambda x: x.mean(0), "sum": lambda x: x.sum(0), "max": lambda x: x.amax(0)}


@dataclass(frozen=True, kw_only=True)
class Shape:
    heads: int
    group: int
    stored: int
    queries: int
    pads: int
    block_queries: int


SHAPES = st.builds(
    Shape,
    heads=st.integers(1, 3),
    group=st.integers(1, 3),
    stored=st.integers(0, 5),
    queries=st.integers(1, 9),
    pads=st.integers(0, 8),
    block_queries=st.integers(1, 4),
)


def random_chunk(shape: Shape, seed: int = 0) -> Chunk:
    """Row 1 is left-padded on a first prompt; with stored entries some slots are empty and out of token order."""
    torch.manual_seed(seed)
    width, total = 4, shape.stored + shape.queries
    pads = min(shape.pads, shape.queries - 1) if shape.stored == 0 else 0
    seen = 2 * shape.stored
    position = torch.stack([seen + torch.arange(shape.queries), seen + torch.arange(shape.queries) - pads])
    position[1, :pads] = -1
    held = torch.stack([torch.randperm(seen)[: shape.stored] for _ in range(2 * shape.heads)]).long()
    held[torch.rand(held.shape) < 0.3] = -1
    new = position[:, None].expand(2, shape.heads, shape.queries)
    return Chunk(
        query=2 * torch.randn(2, shape.heads * shape.group, shape.queries, width),
        keys=2 * torch.randn(2, shape.heads, total, width),
        values=torch.randn(2, shape.heads, total, width),
        query_position=position,
        key_position=torch.cat((held.view(2, shape.heads, shape.stored), new), dim=-1),
        scaling=0.6,
        plain=shape.stored == 0 and pads == 0,
    )


def naive_rows(chunk: Chunk) -> Tensor:
    """(B, Hq, Q, T) float64: zero where nothing is seen, and for pads."""
    batch, query_heads, queries, _ = chunk.query.shape
    rows = torch.zeros(batch, query_heads, queries, chunk.keys.shape[2], dtype=torch.float64)
    for b in range(batch):
        for h in range(query_heads):
            kv = h // chunk.group
            for q in range(queries):
                at = int(chunk.query_position[b, q])
                sees = [t for t, p in enumerate(chunk.key_position[b, kv].tolist()) if 0 <= p <= at]
                if at < 0:
                    continue
                logits = chunk.keys[b, kv, sees].double() @ chunk.query[b, h, q].double() * chunk.scaling
                rows[b, h, q, sees] = logits.softmax(-1)
    return rows


def grouped(chunk: Chunk, rows: Tensor, reduction: str) -> Tensor:
    groups = rows.split(chunk.group, dim=1)
    return torch.stack([REDUCE[reduction](group.transpose(0, 1)) for group in groups], dim=1)


@settings(max_examples=share_of(80), deadline=None, derandomize=True)
@given(shape=SHAPES, seed=st.integers(0, 2**32))
def test_output_mass_and_window_equal_a_softmax_with_loops(shape: Shape, seed: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attend, "_MAX_BLOCK_QUERIES", shape.block_queries)
        chunk = random_chunk(shape, seed)
        rows = naive_rows(chunk)
        real = (chunk.query_position >= 0)[:, None, :, None]
        values = chunk.values.double().repeat_interleave(chunk.group, dim=1)
        output = chunk_output(chunk)
        assert bool(torch.isfinite(output).all())
        torch.testing.assert_close(output.double() * real, rows @ values, rtol=0, atol=1e-5)
        for reduction in REDUCE:
            expected = grouped(chunk, rows, reduction)
            mass = column_mass(chunk, reduction)
            assert mass.dtype == torch.float32
            torch.testing.assert_close(mass.double(), expected.sum(2), rtol=0, atol=1e-5)
            window = last_rows(chunk, 3, reduction)
            torch.testing.assert_close(window.double(), expected[:, :, -3:], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("reduction", "factor"), [("mean", 1), ("sum", 3)])
def test_attention_mass_is_conserved(reduction: str, factor: int) -> None:
    chunk = random_chunk(Shape(heads=2, group=3, stored=0, queries=40, pads=8, block_queries=256))
    total = column_mass(chunk, reduction).sum(-1)
    num_real = (chunk.query_position >= 0).sum(-1)
    torch.testing.assert_close(total, (factor * num_real[:, None]).expand(2, 2).float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("reduction", list(REDUCE))
def test_a_decode_step_equals_a_softmax_with_loops(reduction: str) -> None:
    chunk = random_chunk(Shape(heads=2, group=3, stored=9, queries=1, pads=0, block_queries=1))
    output, rows = decode_step(chunk.query, chunk.keys, chunk.values, chunk.key_position >= 0, chunk.scaling)
    expected = naive_rows(chunk)
    values = chunk.values.double().repeat_interleave(3, dim=1)
    torch.testing.assert_close(output.double(), expected @ values, rtol=0, atol=1e-5)
    reduced = grouped(chunk, expected, reduction)[:, :, 0]
    torch.testing.assert_close(reduce_group(rows, reduction).double(), reduced, rtol=0, atol=1e-5)


@pytest.mark.parametrize("queries", [1, 2, 33])
def test_uniform_attention_has_the_mass_of_the_harmonic_numbers(queries: int) -> None:
    """Equal keys: query q gives 1 / (q + 1) to each token, so token t receives the sum over q >= t."""
    ones = torch.ones(1, 1, queries, 4)
    position = torch.arange(queries)[None]
    places = {"query_position": position, "key_position": position[None]}
    chunk = Chunk(query=ones, keys=ones, values=ones, scaling=1.0, plain=True, **places)
    expected = torch.tensor([sum(1 / (q + 1) for q in range(t, queries)) for t in range(queries)])
    torch.testing.assert_close(column_mass(chunk, "mean")[0, 0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_decode_step_in_half_precision_is_as_near_as_the_fused_kernel(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    query, keys, values = (3 * torch.randn(1, 4, n, 128, generator=generator) for n in (1, 300, 300))
    query, keys, values = query.to(dtype), keys.to(dtype), values.to(dtype)
    valid = torch.ones(1, 4, 300, dtype=torch.bool)
    exact = torch.nn.functional.scaled_dot_product_attention(query.double(), keys.double(), values.double())
    fused = torch.nn.functional.scaled_dot_product_attention(query, keys, values)
    ours, _ = decode_step(query, keys, values, valid, 128**-0.5)
    assert (ours - exact).abs().max() <= 2 * (fused - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()


def test_a_product_beyond_float16_stays_finite() -> None:
    query, keys = torch.full((1, 1, 1, 64), 60.0).half(), torch.full((1, 1, 8, 64), 60.0).half()
    output, _ = decode_step(query, keys, keys, torch.ones(1, 1, 8, dtype=torch.bool), 0.125)
    assert torch.isfinite(output).all()
