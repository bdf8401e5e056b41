"""Sum, norm and rotation of a decode step beside the stock model's, on fresh random inputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

pytest.importorskip("triton", reason="triton is not installed")

from kvbench.kernels.decode_step import add_and_norm_rows, norm_rows, rotate_rows

ON = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter cuts what a GPU rounds to bfloat16.
HALF = [torch.float16, *([torch.bfloat16] if ON == "cuda" else [])]


def norm_of(width: int, dtype: torch.dtype) -> LlamaRMSNorm:
    norm = LlamaRMSNorm(width, eps=1e-5).to(ON, dtype)
    norm.weight.data.copy_(torch.randn(width))
    return norm


def nearly(ours: Tensor, stock: Tensor) -> None:
    """Up to the rounding in between, of which ours has none."""
    torch.testing.assert_close(ours, stock, rtol=2.0**-6 if ours.dtype == torch.bfloat16 else 2.0**-9, atol=1e-6)


@pytest.mark.cover
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("rows", "width"), [(1, 32), (3, 96), (16, 4096)])
def test_a_norm_alone_is_the_models_own(rows: int, width: int, dtype: torch.dtype) -> None:
    norm, x = norm_of(width, dtype), torch.randn(rows, 1, width, device=ON, dtype=dtype)
    nearly(norm_rows(x, norm.weight, norm.variance_epsilon), norm(x))


@pytest.mark.cover
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("rows", "width"), [(1, 32), (3, 96), (16, 4096)])
def test_a_sum_is_the_models_own_to_the_bit_and_its_norm_as_of_the_rounded_sum(
    rows: int, width: int, dtype: torch.dtype
) -> None:
    norm, (x, delta) = norm_of(width, dtype), torch.randn(2, rows, 1, width, device=ON).to(dtype)
    total, normed = add_and_norm_rows(x, delta, norm.weight, norm.variance_epsilon)
    assert torch.equal(total, x + delta)
    nearly(normed, norm(x + delta))


@pytest.mark.parametrize("dtype", HALF)
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
