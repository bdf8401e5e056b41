"""The products of a decode step beside float64; its sum, norm and rotation beside the stock model's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

from kvbench.kernels import decode_step
from kvbench.kernels.decode_step import (
    add_and_norm_rows,
    angle_rows,
    gated_rows,
    norm_rows,
    project_rows,
    rotate_rows,
)
from kvbench.kernels.dispatch import Norm

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
@pytest.mark.parametrize(("rows", "width", "size"), [*SIZES, (35, 128, 40)])
def test_tiles_of_a_wide_input(
    rows: int, width: int, size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_step, "_NARROW", 0)
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
    monkeypatch.setattr(decode_step, "_NARROW", 0)
    x, weight, gain = draw(1, rows, 1, width, dtype=dtype), draw(2, 70, width, dtype=dtype), draw(4, 70, dtype=dtype)
    before, bias = draw(3, rows, 1, 70, dtype=dtype), draw(5, 70, dtype=dtype)
    (parts,) = project_rows(x, [weight], [None], in_parts=True)
    assert (parts.ndim == 4) == (dtype == torch.float16), "float32 has tiles of its own"
    total, _ = add_and_norm_rows(before, parts, gain, 1e-5)
    assert error(total, before.double() + x.double() @ weight.double().T) < TOLERANCE[dtype]
    if parts.ndim == 4:
        assert torch.equal(total, before + parts.sum(0).to(dtype))
    assert project_rows(x, [weight], [bias], in_parts=True)[0].shape == before.shape, "a bias is added once"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_angles_are_the_models_own_at_far_positions_too(dtype: torch.dtype) -> None:
    rotary = LlamaRotaryEmbedding(LlamaConfig(hidden_size=80, num_attention_heads=2)).to(ON)
    position = torch.tensor([[0], [3], [131_071]], device=ON)
    x = torch.empty(3, 1, 80, device=ON, dtype=dtype)
    ours = angle_rows(x, position, rotary.inv_freq, 1.25)
    nearly = 2**-9 if dtype == torch.float16 else 1e-6
    for got, stock in zip(ours, rotary(x.float(), position), strict=True):
        torch.testing.assert_close(got.float(), (stock * 1.25).to(dtype).float(), rtol=0, atol=nearly)


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
    heads = draw(1, 3, 1, 5 + 2, 16, dtype=dtype).transpose(1, 2)
    angles = draw(2, table_rows, 1, 16, dtype=torch.float32) * 3
    given = (heads[:, :5], heads[:, 5:], angles.cos().to(dtype), angles.sin().to(dtype))
    if not is_dense:
        given = tuple(torch.stack([part, part], -1)[..., 0] for part in given[:3]) + given[3:]
    exact = apply_rotary_pos_emb(*(part.double() for part in given))
    for ours, stock, want in zip(rotate_rows(*given), apply_rotary_pos_emb(*given), exact, strict=True):
        assert ours.dtype == dtype
        assert float((ours - want).norm()) <= float((stock - want).norm()) * (1.1 if dtype == torch.float32 else 1.01)
