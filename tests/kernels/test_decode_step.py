"""The products of a decode step beside float64; its sum, norm and rotation beside the stock model's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from kvbench.kernels import decode_step
from kvbench.kernels.decode_step import add_and_norm_rows, gated_rows, norm_rows, project_rows, rotate_rows

pytest.importorskip("triton", reason="triton is not installed")


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
    monkeypatch.setattr(decode_step, "_LONG", 100)
    x, weight = draw(1, rows, 1, 48, dtype=dtype), draw(2, size, 48, dtype=dtype)
    (output,) = project_rows(x, [weight], [None])
    assert error(output, x.double() @ weight.double().T) < TOLERANCE[dtype]


@pytest.mark.cover
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("rows", "width", "size"), SIZES)
def test_tiles_of_a_wide_input(
    rows: int, width: int, size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_step, "_NARROW", 0)
    x, gate, up = (draw(k, count, width, dtype=dtype) for k, count in enumerate((rows, size, size)))
    x = x[:, None]
    want = [x.double() @ weight.double().T for weight in (gate, up)]
    for output, exact in zip(project_rows(x, [gate, up], [None, None]), want, strict=True):
        assert error(output, exact) < TOLERANCE[dtype]
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


pytest.importorskip("triton", reason="triton is not installed")


# The interpreter cuts what a GPU rounds to bfloat16.
DTYPES = [torch.float16, torch.float32, *([torch.bfloat16] if ON == "cuda" else [])]
ROUNDING = {torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9, torch.float32: 2.0**-19}


def norm_of(width: int, dtype: torch.dtype) -> LlamaRMSNorm:
    norm = LlamaRMSNorm(width, eps=1e-5).to(ON, dtype)
    norm.weight.data.copy_(torch.randn(width))
    return norm


def nearly(ours: Tensor, stock: Tensor) -> None:
    """Up to the rounding in between, of which ours has none."""
    torch.testing.assert_close(ours, stock, rtol=ROUNDING[ours.dtype], atol=1e-6)


@pytest.mark.cover
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 32), (3, 96), (16, 4096)])
def test_a_norm_alone_is_the_models_own(rows: int, width: int, dtype: torch.dtype) -> None:
    norm, x = norm_of(width, dtype), torch.randn(rows, 1, width, device=ON, dtype=dtype)
    nearly(norm_rows(x, norm.weight, norm.variance_epsilon), norm(x))


@pytest.mark.cover
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 32), (3, 96), (16, 4096)])
def test_a_sum_is_the_models_own_to_the_bit_and_its_norm_as_of_the_rounded_sum(
    rows: int, width: int, dtype: torch.dtype
) -> None:
    norm, (x, delta) = norm_of(width, dtype), torch.randn(2, rows, 1, width, device=ON).to(dtype)
    total, normed = add_and_norm_rows(x, delta, norm.weight, norm.variance_epsilon)
    assert torch.equal(total, x + delta)
    nearly(normed, norm(x + delta))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_dense", [True, False])
@pytest.mark.parametrize("table_rows", [1, 3])
def test_rotation_is_nearer_to_exact_than_the_models_own(table_rows: int, is_dense: bool, dtype: torch.dtype) -> None:
    heads = torch.randn(3, 1, 5 + 2, 16, device=ON).to(dtype).transpose(1, 2)
    angles = torch.rand(table_rows, 1, 16, device=ON) * 6
    given = (heads[:, :5], heads[:, 5:], angles.cos().to(dtype), angles.sin().to(dtype))
    if not is_dense:
        given = tuple(torch.stack([part, part], -1)[..., 0] for part in given[:3]) + given[3:]
    exact = apply_rotary_pos_emb(*(part.double() for part in given))
    for ours, stock, want in zip(rotate_rows(*given), apply_rotary_pos_emb(*given), exact, strict=True):
        assert ours.dtype == dtype
        assert float((ours - want).norm()) <= float((stock - want).norm()) * 1.01
