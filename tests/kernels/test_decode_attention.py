"""Decode attention over slots: the kernel beside plain torch and float64, on fresh random inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvbench.cache.attention import decode_step, reduce_group
from kvbench.cache.positions import Rotation
from kvbench.cache.selection import age_rank

pytest.importorskip("triton", reason="triton is not installed")

from kvbench.kernels import decode_attention as kernel
from kvbench.kernels.decode_attention import Ragged, Turn

ON = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(2, 4, 2, 37, 16), (1, 2, 2, 130, 32), (3, 8, 1, 70, 64), (1, 4, 4, 5, 80)]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


def decode_attention(*given: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
    """Return output and probabilities, the rest handed out at once."""
    output, hand_out = kernel.decode_attention(*given, **options)
    return output, hand_out()


def slots(shape: tuple[int, int, int, int, int], dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    batch, query_heads, heads, capacity, width = shape
    random = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=random).to(ON, dtype)

    query = draw(batch, query_heads, 1, width)
    keys, values = draw(batch, heads, capacity, width), draw(batch, heads, capacity, width)
    length = torch.randint(1, capacity + 1, (batch, heads), generator=random).to(ON)
    length.view(-1)[0] = capacity
    held = torch.arange(capacity, device=ON) < length[..., None]
    keys = keys.masked_fill(~held[..., None], float("nan"))  # what no token holds must not be read
    values = values.masked_fill(~held[..., None], float("nan"))
    return query, keys, values, length, held


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.cover
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("reduction", ["mean", "sum", "max"])
@pytest.mark.parametrize("most_parts", [1, 64])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_attends_as_float64_does(
    shape: tuple[int, ...], most_parts: int, reduction: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "_MAX_PARTS", most_parts)
    monkeypatch.setattr(kernel, "_GIVEN_SLOTS", 64)
    query, keys, values, length, held = slots(shape, dtype, seed=sum(shape))
    before = torch.rand(held.shape, device=ON)
    mass = before.clone()
    output, probs = decode_attention(query, keys, values, length, 0.3, reduction=reduction, mass=mass, want_probs=True)
    exact, rows = decode_step(query.double(), keys.nan_to_num().double(), values.nan_to_num().double(), held, 0.3)
    assert error(output, exact) < TOLERANCE[dtype]
    want = reduce_group(rows, reduction)
    assert probs is not None
    assert error(probs * held, want) < TOLERANCE[dtype]
    assert torch.equal(mass[~held], before[~held]), "mass of empty slots is left alone"
    assert error((mass - before) * held, want) < TOLERANCE[dtype] + 1e-6
    assert bool((probs[~held] == 0).all())


@pytest.mark.parametrize("tile", ["_FEW", "_MANY", "_VERY_MANY", "_NARROW", "_NARROW_FLOATS"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_tile_attends_as_float64_does(dtype: torch.dtype, tile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_tile", lambda *given: getattr(kernel, tile))
    query, keys, values, length, held = slots((2, 4, 2, 150, 32), dtype, seed=21)
    output, probs = decode_attention(query, keys, values, length, 0.3, want_probs=True)
    exact, rows = decode_step(query.double(), keys.nan_to_num().double(), values.nan_to_num().double(), held, 0.3)
    assert error(output, exact) < TOLERANCE[dtype]
    assert probs is not None
    assert error(probs * held, reduce_group(rows, "mean")) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("pairs", "width", "dtype", "tile", "parts"),
    [
        (8, 128, torch.bfloat16, "_FEW", 32),
        (256, 128, torch.bfloat16, "_FEW", 1),
        (512, 128, torch.bfloat16, "_MANY", 1),
        (1536, 128, torch.bfloat16, "_VERY_MANY", 1),
        (48, 64, torch.bfloat16, "_NARROW", 16),
        (48, 64, torch.float32, "_NARROW_FLOATS", 8),
    ],
)
def test_small_programs_where_they_are_many(
    pairs: int, width: int, dtype: torch.dtype, tile: str, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "num_processors", lambda device: 132)  # of an H200
    keys = torch.empty(1, 1, 1, width, dtype=dtype)
    assert kernel._tile(pairs, width, dtype.itemsize, 16, 132, 232_448) == getattr(kernel, tile)
    assert kernel._num_parts(pairs, 400, keys) == parts


@pytest.mark.parametrize(
    ("width", "dtype", "query_rows", "room_bytes", "tile"),
    [
        (128, torch.bfloat16, 16, 101_376, kernel.Tile(32, 4, 2)),
        (256, torch.bfloat16, 16, 101_376, kernel.Tile(16, 2, 2)),
        (128, torch.float32, 32, 101_376, kernel.Tile(16, 2, 2)),
        (256, torch.float32, 32, 232_448, kernel.Tile(32, 2, 2)),
    ],
)
def test_a_tile_is_cut_to_the_memory_that_a_program_has(
    width: int,
    dtype: torch.dtype,
    query_rows: int,
    room_bytes: int,
    tile: kernel.Tile,
) -> None:
    assert kernel._tile(8, width, dtype.itemsize, query_rows, 132, room_bytes) == tile


@pytest.mark.parametrize("shape", SHAPES)
def test_without_statistics_the_output_is_the_same(shape: tuple[int, ...]) -> None:
    query, keys, values, length, _ = slots(shape, torch.float32, seed=7)
    plain, nothing = decode_attention(query, keys, values, length, 0.3)
    with_probs, _ = decode_attention(query, keys, values, length, 0.3, want_probs=True)
    assert nothing is None
    # On a GPU the two are compiled apart and may round apart; the interpreter does the same operations.
    torch.testing.assert_close(plain, with_probs, rtol=0 if ON == "cpu" else 1e-6, atol=0 if ON == "cpu" else 1e-6)


def scattered(held: Tensor, length: Tensor, seen: int) -> Tensor:
    """Positions (B, H, C) of held slots as a score leaves them, the newest in the last slot."""
    random = torch.Generator().manual_seed(12)
    order = torch.rand((*held.shape[:2], seen - 1), generator=random).argsort(-1)[..., : held.shape[-1]].to(ON)
    return torch.where(held, order, -1).scatter(2, (length - 1)[..., None], seen - 1)


def in_place_of(position: Tensor, rank: Tensor, length: Tensor, seen: Tensor) -> Tensor:
    """How many first slots of a head hold what is in its place, if all others moved as the query; -1 if not."""
    placed, held = (position == rank) & (position >= 0), position >= 0
    as_query = (position - rank) == (seen[:, None] - length)[..., None]
    first = torch.arange(position.shape[-1], device=position.device) < placed.sum(-1, keepdim=True)
    sound = ((placed == first) & (placed | as_query | ~held)).all(-1)
    return torch.where(sound, placed.sum(-1).int(), -1)


def sinks_and_window(held: Tensor, length: Tensor, seen: int) -> Tensor:
    """Positions (B, H, C) of two sinks and a window that came round in its slots."""
    position = torch.full(held.shape, -1, device=ON)
    for row, count in zip(position.flatten(0, 1), length.flatten().tolist(), strict=True):
        sinks = min(2, count - 1)
        row[:sinks] = torch.arange(sinks)
        row[sinks:count] = torch.arange(seen - count + sinks, seen).roll(count // 3)
    return position


@pytest.mark.cover
@pytest.mark.parametrize(("left", "known"), [(scattered, True), (sinks_and_window, True), (sinks_and_window, False)])
@pytest.mark.parametrize("most_parts", [1, 64])
@pytest.mark.parametrize("shape", [*SHAPES, (1, 20, 2, 45, 32)])
def test_keys_are_turned_to_their_ranks_on_the_way_in(
    shape: tuple[int, ...], most_parts: int, left: Any, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`known`: whether somebody looked who is in place."""
    monkeypatch.setattr(kernel, "_MAX_PARTS", most_parts)
    query, keys, values, length, held = slots(shape, torch.float32, seed=11)
    batch, heads, capacity = held.shape
    width = keys.shape[-1]
    seen = torch.full((batch,), 3 * capacity, device=ON)
    position = left(held, length, 3 * capacity)
    rotation = Rotation(frequencies=1.0 / 100.0 ** torch.linspace(0, 1, width // 2, device=ON))
    rank = age_rank(position)
    tables = rotation.tables(3 * capacity + 1)
    in_place = in_place_of(position, rank, length, seen)
    assert bool((in_place < 0).any()) == (left is scattered)
    turn = Turn(seen, position, rank.int(), in_place if known else torch.full_like(in_place, -1), *tables)
    output, probs = decode_attention(query, keys, values, length, 0.3, want_probs=True, turn=turn)
    turned = rotation.turn(keys.nan_to_num(), rank - position)
    grouped = query.reshape(batch, heads, -1, width)
    turned_query = rotation.turn(grouped, (length - 1 - (seen - 1)[:, None])[..., None]).reshape(query.shape)
    exact, rows = decode_step(turned_query, turned, values.nan_to_num(), held, 0.3)
    assert error(output, exact) < 2e-5
    assert probs is not None
    assert error(probs, reduce_group(rows, "mean")) < 2e-5


@pytest.mark.parametrize("with_turn", [False, True])
def test_heads_of_different_lengths_in_one_buffer_are_read_as_padded_ones(with_turn: bool) -> None:
    query, keys, values, length, held = slots((2, 4, 2, 37, 16), torch.float32, seed=5)
    random = torch.Generator().manual_seed(2)
    room = (length.cpu() + torch.randint(0, 4, length.shape, generator=random)).clamp(max=37)
    ends = room.flatten().cumsum(0)
    start = (ends - room.flatten()).view_as(room).to(ON)

    def flat(padded: Tensor) -> Tensor:
        heads = zip(padded.flatten(0, 1), room.flatten().tolist(), strict=True)
        return torch.cat([head[:count] for head, count in heads])

    mass = torch.rand(held.shape, device=ON)
    flat_mass, turn, flat_turn = flat(mass), None, None
    if with_turn:
        position = scattered(held, length, 90)
        rank = age_rank(position).int()
        tables = Rotation(frequencies=torch.ones(8, device=ON)).tables(91)
        seen = torch.full((2,), 90, device=ON)
        turn = Turn(seen, position, rank, in_place_of(position, rank, length, seen), *tables)
        flat_turn = turn._replace(position=flat(position), rank=flat(rank))
    output, probs = decode_attention(query, keys, values, length, 0.3, mass=mass, want_probs=True, turn=turn)
    ragged = Ragged(start, 37)
    again, probs_again = decode_attention(
        query, flat(keys), flat(values), length, 0.3, mass=flat_mass, want_probs=True, turn=flat_turn, ragged=ragged
    )
    assert probs is not None
    assert probs_again is not None
    for one, other in ((again, output), (probs_again, probs), (flat_mass, flat(mass))):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("width", "with_turn", "size"), [(16, True, 32), (16, False, 16), (80, True, 128)])
def test_both_halves_of_a_turned_head_fill_a_product(
    width: int, with_turn: bool, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    real = kernel.attend_part

    class Noted:
        def __getitem__(self, grid: Any) -> Any:
            def launch(*arguments: Any, **constants: Any) -> None:
                sizes.append(constants["BLOCK_D"])
                real[grid](*arguments, **constants)

            return launch

    monkeypatch.setattr(kernel, "attend_part", Noted())
    query, keys, values, length, held = slots((1, 2, 2, 9, width), torch.float32, seed=3)
    rank = torch.arange(9, device=ON).expand(held.shape).contiguous()
    table = torch.ones(20, width // 2, device=ON)
    turn = Turn(length[:, 0], rank, rank.int(), torch.full_like(length, -1, dtype=torch.int32), table, 0 * table)
    decode_attention(query, keys, values, length, 0.3, turn=turn if with_turn else None)
    assert sizes == [size]
