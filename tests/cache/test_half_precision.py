from __future__ import annotations

import pytest
import torch

from kvbench.cache.attention import decode_step


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
