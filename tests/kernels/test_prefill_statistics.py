"""Column mass and window rows by the kernels, against float64 softmax rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvbench.cache.attention import chunk_attention, column_mass, last_rows, reduce_group
from kvbench.kernels.dispatch import Chunk, kernels_forced

pytest.importorskip("triton", reason="triton is not installed")
ON = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
REDUCTIONS = ["mean", "sum", "max"]
# KV heads, group, head size, queries, stored, pads of row 1
SHAPES = [
    (2, 1, 16, 1, 0, 0),
    (1, 4, 80, 70, 0, 13),
    (2, 2, 32, 33, 9, 0),
    (1, 3, 128, 65, 0, 0),
    (1, 2, 96, 40, 70, 0),
]


def chunk_of(shape: tuple[int, ...], dtype: torch.dtype) -> Chunk:
    """Two rows; states lie as models make them, (B, Q, H, D) transposed; a third of stored slots are empty."""
    heads, group, width, queries, stored, pads = shape
    torch.manual_seed(sum(shape))
    query, keys, values = (
        torch.randn(2, length, count, width).to(dtype).transpose(1, 2).to(ON)
        for length, count in ((queries, heads * group), (stored + queries, heads), (stored + queries, heads))
    )
    new = stored * 2 + torch.arange(queries) - torch.tensor([[0], [pads]])
    new[1, :pads] = -1
    held = torch.stack([torch.randperm(2 * stored)[:stored] for _ in range(2 * heads)]).long().view(2, heads, stored)
    held[torch.rand(held.shape) < 0.3] = -1
    return Chunk(
        query=query,
        keys=keys,
        values=values,
        query_position=new.to(ON),
        key_position=torch.cat((held, new[:, None].expand(2, heads, queries)), dim=-1).to(ON),
        scaling=width**-0.5,
        plain=stored == 0 and pads == 0,
    )


def exact_rows(chunk: Chunk, reduction: str) -> Tensor:
    """(B, H, Q, T) float64: the softmax written out, zero for pads."""
    asks, held = chunk.query_position[:, None, :, None], chunk.key_position[:, :, None]
    sees = ((held >= 0) & (held <= asks)).repeat_interleave(chunk.group, dim=1)
    keys = chunk.keys.double().repeat_interleave(chunk.group, dim=1)
    logits = (chunk.query.double() @ keys.transpose(-1, -2) * chunk.scaling).masked_fill(~sees, -torch.inf)
    rows = logits.softmax(-1).nan_to_num(0.0)
    return reduce_group(rows.unflatten(1, (-1, chunk.group)), reduction)


def assert_exact(chunk: Chunk, reduction: str, *, by_output: bool = True) -> None:
    rows = exact_rows(chunk, reduction)
    with kernels_forced(True):
        lse = chunk_attention(chunk, wants_lse=True)[1] if by_output else None
        assert (lse is not None) == by_output
        mass, window = column_mass(chunk, reduction, lse), last_rows(chunk, 7, reduction, lse)
    assert mass.dtype == window.dtype == torch.float32
    error = (mass.double() - rows.sum(2)).abs().amax() / rows.sum(2).amax()
    assert float(error) <= 1e-6
    torch.testing.assert_close(window.double(), rows[:, :, -7:], rtol=1e-5, atol=2e-6)


@pytest.mark.cover("one")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_mass_and_window_are_those_of_a_float64_softmax(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for reduction in REDUCTIONS:
        assert_exact(chunk_of(shape, dtype), reduction)


@pytest.mark.long
def test_the_log_sum_exp_is_worked_out_where_none_is_given() -> None:
    assert_exact(chunk_of(SHAPES[1], torch.float32), "mean", by_output=False)


@pytest.mark.long
def test_mass_is_the_same_every_time() -> None:
    chunk = chunk_of(SHAPES[1], torch.float32)
    with kernels_forced(True):
        assert torch.equal(column_mass(chunk, "mean"), column_mass(chunk, "mean"))


def use_tiles(monkeypatch: pytest.MonkeyPatch, block_q: int, block_k: int, *, described: bool) -> Any:
    """Let attention mass be added up in small tiles, so that a short prompt has many."""
    from kvbench.kernels import prefill

    tiles = prefill.Tiles(block_q=block_q, block_k=block_k, num_warps=4, num_stages=2, described=described)
    monkeypatch.setattr(prefill, "mass_tiles_for", lambda *arguments: tiles)
    return tiles


@pytest.mark.cover("one")
@pytest.mark.parametrize("described", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("pads", [0, 21])  # plain prompts have blocks of queries that see every key of a block
@pytest.mark.parametrize("seed", range(3))
def test_mass_over_many_blocks_is_the_plain_one(
    seed: int, pads: int, reduction: str, described: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    block_q, block_k = ((16, 32), (32, 16), (16, 16))[seed]
    use_tiles(monkeypatch, block_q, block_k, described=described)
    group, queries = (1, 3, 2)[seed], 44 + 9 * seed
    chunk = chunk_of((1, group, 16, queries, 0, pads), torch.float32)
    with kernels_forced(True):
        mass = column_mass(chunk, reduction)
    with kernels_forced(False):
        reference = column_mass(chunk, reduction)
    torch.testing.assert_close(mass, reference, rtol=2e-6, atol=2e-6)


@pytest.mark.long
@pytest.mark.parametrize("described", [False, True])
def test_blocks_of_queries_that_see_all_keys_of_a_block_need_no_mask(
    described: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_tiles(monkeypatch, 16, 32, described=described)
    chunk = chunk_of((1, 2, 16, 75, 0, 0), torch.float32)
    with kernels_forced(True):
        mass = column_mass(chunk, "mean")
    with kernels_forced(False):
        torch.testing.assert_close(mass, column_mass(chunk, "mean"), rtol=2e-6, atol=2e-6)


def test_long_prompts_get_larger_tiles_where_shared_memory_allows() -> None:
    from kvbench.kernels.prefill import Tiles, mass_tiles_for

    def tiles(width: int, entries: int, reduction: str, dtype: torch.dtype = torch.bfloat16) -> Tiles:
        return mass_tiles_for(torch.empty(1, 1, 1, width, dtype=dtype), entries, reduction)

    assert tiles(128, 32_768, "mean").block_q == 2 * tiles(128, 900, "mean").block_q
    assert tiles(128, 32_768, "mean").described
    assert tiles(128, 32_768, "max") == tiles(128, 900, "max")
    assert tiles(256, 32_768, "mean") == tiles(256, 900, "mean")
    assert tiles(128, 32_768, "mean", torch.float32) == tiles(128, 900, "mean", torch.float32)


@pytest.mark.parametrize("amiss", ["steps", "start"])
def test_queries_that_lie_between_the_unit_s_addresses_are_fetched_one_by_one(
    amiss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvbench.kernels import prefill

    tiles = use_tiles(monkeypatch, 16, 16, described=True)
    chunk = chunk_of((1, 2, 16, 40, 0, 0), torch.float32)
    if not prefill.has_tile_loads(chunk.query.device):
        pytest.skip("no unit for tiles")
    assert prefill._described(chunk.query, tiles) is not None
    wide = torch.zeros(2, 2, 40, 18 if amiss == "steps" else 20, device=ON)
    query = wide[..., :16] if amiss == "steps" else wide[..., 1:17]
    query.copy_(chunk.query)
    moved = replace(chunk, query=query)
    assert prefill._described(query, tiles) is None
    with kernels_forced(True):
        assert torch.equal(column_mass(moved, "mean"), column_mass(chunk, "mean"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        (8, 1, 128, 900, 0, 0),
        (2, 4, 128, 1500, 0, 300),
        (2, 7, 64, 700, 0, 0),
        (2, 4, 128, 256, 500, 0),
        (1, 4, 128, 4200, 0, 0),
        (1, 2, 64, 4100, 0, 100),
    ],
)
def test_statistics_at_real_sizes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    chunk = chunk_of(shape, dtype)
    for reduction in REDUCTIONS:
        assert_exact(chunk, reduction)
    if dtype != torch.float32:
        output = chunk_attention(chunk, wants_lse=False)[0]
        with kernels_forced(False):
            reference = chunk_attention(replace(chunk), wants_lse=False)[0]
        real = (chunk.query_position >= 0)[:, None, :, None]
        torch.testing.assert_close(output * real, reference * real, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_sum_over_a_long_prompt_loses_nothing() -> None:
    length = 20_000
    chunk = chunk_of((1, 2, 128, length, 0, 0), torch.bfloat16)
    chunk.keys.zero_()  # so that query number i gives 1 / (i + 1) to each key it sees
    mass = column_mass(chunk, "mean", chunk_attention(chunk, wants_lse=True)[1])[:, :, 0].double()
    exact = (1 / torch.arange(1, length + 1, dtype=torch.float64)).sum()
    assert float((mass / exact - 1).abs().max()) <= 1e-6
