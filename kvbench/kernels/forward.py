"""A prompt's attention output with its log-sum-exp, by the libraries' fused kernels; half precision on CUDA.

FlashAttention-2 makes it, and from Hopper on cuDNN that of long prompts, in about half of the time. Which of them does
not depend on the policy, so logits do not either.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvbench.kernels.dispatch import has_tile_loads

_CUDNN_TOKENS = 8192  # it makes a plan for every new length, 40 to 50 ms: as much as 32 layers save at that length
_CUDNN_VERSION = 91_000
_CUDNN_WIDTH = 128


def flash_takes(query: Tensor) -> bool:
    """Return whether the fused forward takes these queries: CUDA, half precision, head size a multiple of 8 to 256."""
    width = query.shape[-1]
    return query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and width % 8 == 0 and width <= 256


def causal_forward(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Return output (B, Hq, N, D) and log-sum-exp (B, Hq, N) float32 of a prompt without pads.

    The public `scaled_dot_product_attention` computes the same log-sum-exp and throws it away.
    query (B, Hq, N, D); keys, values (B, H, N, D). Query heads share KV heads in the kernel where it
    can; where it refuses that, keys and values are repeated for the call. Long prompts go to cuDNN where it is the
    faster one (`_cudnn_takes`).
    """
    if _cudnn_takes(query):
        try:
            return _cudnn(query, keys, values, scaling)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # no plan for these states: the other kernel takes them
            pass
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
    query: Tensor, keys: Tensor, values: Tensor, scaling: float, pads: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return the same for left-padded rows, `pads[b]` pads in row b: there output is 0, log-sum-exp +inf.

    It goes row by row, each being a whole causal prompt after its pads: no mask, no copy.
    """
    output = torch.zeros_like(query)
    lse = torch.full(query.shape[:3], torch.inf, dtype=torch.float32, device=query.device)
    for row, start in enumerate(pads):
        if start == query.shape[2]:
            continue
        real = (slice(row, row + 1), slice(None), slice(start, None))
        output[real], lse[real] = causal_forward(query[real], keys[real], values[real], scaling)
    return output, lse


def _cudnn_takes(query: Tensor) -> bool:
    """Return whether cuDNN makes the forward of these queries, in 0.52 of the other's time on an H200 (docs/log.md).

    From Hopper on, in long prompts, for the head sizes for which it is seen to be right, unless it is turned off
    (`torch.backends.cuda.enable_cudnn_sdp`).
    """
    width = query.shape[-1]
    if not query.is_cuda or query.shape[2] < _CUDNN_TOKENS or width > _CUDNN_WIDTH or width % 8 != 0:
        return False
    version = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    return has_tile_loads(query.device) and (version or 0) >= _CUDNN_VERSION and torch.backends.cuda.cudnn_sdp_enabled()


def _cudnn(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    output, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, keys, values, None, True, 0.0, True, False, scale=scaling
    )[:2]
    return output, lse.reshape(query.shape[:3])


def _flash(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention(
        query, keys, values, 0.0, True, False, scale=scaling
    )[:2]
    return output, lse[..., : query.shape[2]]
