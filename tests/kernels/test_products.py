"""The products of a decode step beside float64, with the norm before and the sum after them where they make these."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from kvbench.kernels import products
from kvbench.kernels.decode_step import add_and_norm_rows
from kvbench.kernels.dispatch import Norm
from kvbench.kernels.products import gated_rows, project_rows

ON = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 6e-3, torch.float32: 1e-6}
SIZES = [(1, 64, 40), (1, 300, 17), (3, 128, 33), (16, 300, 40), (17, 256, 64)]


def draw(seed: int, *size: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(ON, dtype)


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.cover
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("rows", "width", "size"), SIZES)
@pytest.mark.parametrize("num_matrices", [1, 2, 3])
def test_products_of_matrices_with_one_input(
    num_matrices: int, rows: int, width: int, size: int, with_bias: bool, dtype: torch.dtype
) -> None:
    x = draw(1, rows, 1, width, dtype=dtype)
    weights = [draw(2 + k, size + 5 * k, width, dtype=dtype) for k in range(num_matrices)]
    biases = [draw(9 + k, size + 5 * k, dtype=dtype) if with_bias else None for k in range(num_matrices)]
    for output, weight, bias in zip(project_rows(x, weights, biases), weights, biases, strict=True):
        want = x.double() @ weight.double().T + (0 if bias is None else bias.double())
        assert output.shape == want.shape
        assert error(output, want) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("rows", "size"), [(3, 130), (18, 130), (18, 50), (35, 50)])
def test_tiles_of_a_vocabulary_and_of_larger_batches(
    rows: int, size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_LONG", 100)
    x, weight = draw(1, rows, 1, 48, dtype=dtype), draw(2, size, 48, dtype=dtype)
    (output,) = project_rows(x, [weight], [None])
    assert error(output, x.double() @ weight.double().T) < TOLERANCE[dtype]


@pytest.mark.cover
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("rows", "width", "size"), [*SIZES, (35, 128, 40)])
def test_tiles_of_a_wide_input(
    rows: int, width: int, size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_NARROW", 0)
    x, gate, up = (draw(k, count, width, dtype=dtype) for k, count in enumerate((rows, size, size)))
    x = x[:, None]
    want = [x.double() @ weight.double().T for weight in (gate, up)]
    for output, exact in zip(project_rows(x, [gate, up], [None, None]), want, strict=True):
        assert error(output, exact) < TOLERANCE[dtype]
    assert error(project_rows(x, [gate] * 3, [None] * 3)[2], want[0]) < TOLERANCE[dtype]
    assert error(project_rows(x, [gate], [None])[0], want[0]) < TOLERANCE[dtype]
    assert error(gated_rows(x, gate, up), torch.nn.functional.silu(want[0]) * want[1]) < TOLERANCE[dtype]


@pytest.mark.cover
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("rows", "width", "size"), SIZES)
def test_gate_and_up_with_the_activation_between(rows: int, width: int, size: int, dtype: torch.dtype) -> None:
    x = draw(1, rows, 1, width, dtype=dtype)
    gate, up = draw(2, size, width, dtype=dtype), draw(3, size, width, dtype=dtype)
    want = torch.nn.functional.silu(x.double() @ gate.double().T) * (x.double() @ up.double().T)
    assert error(gated_rows(x, gate, up), want) < TOLERANCE[dtype]


@pytest.mark.cover
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("rows", "width", "size"), [(1, 64, 40), (1, 300, 17), (3, 128, 33)])
@pytest.mark.parametrize("num_matrices", [1, 3])
def test_a_norm_before_and_a_sum_after_are_made_by_the_product_between(
    num_matrices: int, rows: int, width: int, size: int, with_bias: bool, dtype: torch.dtype
) -> None:
    x, gain = draw(1, rows, 1, width, dtype=dtype), draw(7, width, dtype=dtype)
    weights = [draw(2 + k, size + 5 * k, width, dtype=dtype) for k in range(num_matrices)]
    biases = [draw(9 + k, size + 5 * k, dtype=dtype) if with_bias else None for k in range(num_matrices)]
    before = draw(8, rows, 1, size, dtype=dtype) if num_matrices == 1 else None
    exact = x.double()
    normed = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + 1e-5) * gain.double()
    outputs = project_rows(x, weights, biases, norm=Norm(gain, 1e-5), before=before)
    for output, weight, bias in zip(outputs, weights, biases, strict=True):
        want = normed @ weight.double().T + (0 if bias is None else bias.double())
        want = want if before is None else want + before.double()
        assert error(output, want) < 2 * TOLERANCE[dtype]
    gate, up = weights[0], weights[-1][:size]
    want = torch.nn.functional.silu(normed @ gate.double().T) * (normed @ up.double().T)
    assert error(gated_rows(x, gate, up, Norm(gain, 1e-5)), want) < 3 * TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [1, 3, 16, 20])
def test_a_sum_is_the_models_own_to_the_bit_where_a_product_adds_it(rows: int, dtype: torch.dtype) -> None:
    x, weight, before = (
        draw(1, rows, 1, 64, dtype=dtype),
        draw(2, 40, 64, dtype=dtype),
        draw(3, rows, 1, 40, dtype=dtype),
    )
    alone, added = project_rows(x, [weight], [None])[0], project_rows(x, [weight], [None], before=before)[0]
    assert torch.equal(added, before + alone)


@pytest.mark.cover
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("rows", "width"), [(3, 300), (16, 512), (20, 300), (35, 300)])
def test_a_product_in_parts_is_added_up_with_the_sum_after_it(
    rows: int, width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_NARROW", 0)
    x, weight, gain = draw(1, rows, 1, width, dtype=dtype), draw(2, 70, width, dtype=dtype), draw(4, 70, dtype=dtype)
    before, bias = draw(3, rows, 1, 70, dtype=dtype), draw(5, 70, dtype=dtype)
    (parts,) = project_rows(x, [weight], [None], in_parts=True)
    assert (parts.ndim == 4) == (dtype == torch.float16), "float32 has tiles of its own"
    total, _ = add_and_norm_rows(before, parts, gain, 1e-5)
    assert error(total, before.double() + x.double() @ weight.double().T) < TOLERANCE[dtype]
    if parts.ndim == 4:
        assert torch.equal(total, before + parts.sum(0).to(dtype))
    assert project_rows(x, [weight], [bias], in_parts=True)[0].shape == before.shape, "a bias is added once"


@pytest.mark.parametrize("kib", [99, 163, 227])
def test_no_tile_takes_more_shared_memory_than_the_device_has(kib: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "shared_bytes", lambda device: kib * 1024)
    most = 0
    for rows in (2, 16, 32, 64):
        for sizes in ((4096,), (5120,), (32_000,), (6144, 6144), (4096, 1024, 1024)):
            x = torch.empty(rows, 1, 4096, dtype=torch.bfloat16)
            tile = products._blocks(x, sizes, in_parts=len(sizes) == 1)
            weights = 2 if len(sizes) == 2 else 1  # gate and up, in one loop
            stage_bytes = (weights * int(tile["BLOCK_N"]) + int(tile["BLOCK_M"])) * int(tile["BLOCK_K"]) * 2
            assert int(tile["STAGES"]) >= 2, "or nothing would be read ahead"
            most = max(most, int(tile["STAGES"]) * stage_bytes)
    assert most <= kib * 1024
