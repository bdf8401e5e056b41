"""The decode step's matrix products beside float64, on fresh random inputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from kvbench.kernels.decode_step import gated_rows, project_rows

ON = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 6e-3}
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


@pytest.mark.cover
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("rows", "width", "size"), SIZES)
def test_gate_and_up_with_the_activation_between(rows: int, width: int, size: int, dtype: torch.dtype) -> None:
    x = draw(1, rows, 1, width, dtype=dtype)
    gate, up = draw(2, size, width, dtype=dtype), draw(3, size, width, dtype=dtype)
    want = torch.nn.functional.silu(x.double() @ gate.double().T) * (x.double() @ up.double().T)
    assert error(gated_rows(x, gate, up), want) < TOLERANCE[dtype]
