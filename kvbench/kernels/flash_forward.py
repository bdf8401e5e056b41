"""The fused causal forward that hands out its log-sum-exp together with the output.

The public `scaled_dot_product_attention` computes the same log-sum-exp and throws it away. A
left-padded prompt goes row by row, each row being a whole causal prompt after its pads: no mask, no copy.
"""

from __future__ import annotations

import torch
from torch import Tensor

_HALF = (torch.bfloat16, torch.float16)


def takes(query: Tensor) -> bool:
    """Return whether the fused forward takes these queries: CUDA, half precision, head size a multiple of 8 to 256."""
    width = query.shape[-1]
    return query.is_cuda and query.dtype in _HALF and width % 8 == 0 and width <= 256


def causal_forward(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Return output (B, Hq, N, D) and log-sum-exp (B, Hq, N) float32 of a prompt without pads.

    query (B, Hq, N, D); keys, values (B, H, N, D). Query heads share KV heads in the kernel where it
    can; where it refuses that, keys and values are repeated for the call.
    """
    try:
        return _flash(query, keys, values, scaling)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        group = query.shape[1] // keys.shape[1]
        if group == 1:
            raise
        return _flash(query, keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1), scaling)


def padded_forward(
    query: Tensor, keys: Tensor, values: Tensor, scaling: float, pads: list[int]
) -> tuple[Tensor, Tensor]:
    """Return the same for left-padded rows, `pads[b]` pads in row b: there output is 0, log-sum-exp +inf."""
    output = torch.zeros_like(query)
    lse = torch.full(query.shape[:3], torch.inf, dtype=torch.float32, device=query.device)
    for row, start in enumerate(pads):
        if start == query.shape[2]:
            continue
        real = (slice(row, row + 1), slice(None), slice(start, None))
        output[real], lse[real] = causal_forward(query[real], keys[real], values[real], scaling)
    return output, lse


def _flash(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention(
        query, keys, values, 0.0, True, False, scale=scaling
    )[:2]
    return output, lse[..., : query.shape[2]]
