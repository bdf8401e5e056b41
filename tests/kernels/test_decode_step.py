"""What a decode step does between its products beside the stock model's: sum, norm, angles and rotation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

pytest.importorskip("triton", reason="triton is not installed")

from kvbench.kernels.decode_step import add_and_norm_rows, angle_rows, norm_rows, rotate_rows

ON = "cuda" if torch.cuda.is_available() else "cpu"
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
    random = torch.Generator().manual_seed(table_rows)
    heads = torch.randn(3, 1, 5 + 2, 16, generator=random).to(ON, dtype).transpose(1, 2)
    angles = torch.rand(table_rows, 1, 16, generator=random).to(ON) * 6
    given = (heads[:, :5], heads[:, 5:], angles.cos().to(dtype), angles.sin().to(dtype))
    if not is_dense:
        given = tuple(torch.stack([part, part], -1)[..., 0] for part in given[:3]) + given[3:]
    exact = apply_rotary_pos_emb(*(part.double() for part in given))
    for ours, stock, want in zip(rotate_rows(*given), apply_rotary_pos_emb(*given), exact, strict=True):
        assert ours.dtype == dtype
        assert float((ours - want).norm()) <= float((stock - want).norm()) * (1.1 if dtype == torch.float32 else 1.01)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_angles_are_the_models_own_at_far_positions_too(dtype: torch.dtype) -> None:
    rotary = LlamaRotaryEmbedding(LlamaConfig(hidden_size=80, num_attention_heads=2)).to(ON)
    position = torch.tensor([[0], [3], [131_071]], device=ON)
    x = torch.empty(3, 1, 80, device=ON, dtype=dtype)
    ours = angle_rows(x, position, rotary.inv_freq, 1.25)
    nearly = 2**-9 if dtype == torch.float16 else 1e-6
    for got, stock in zip(ours, rotary(x.float(), position), strict=True):
        torch.testing.assert_close(got.float(), (stock * 1.25).to(dtype).float(), rtol=0, atol=nearly)
