"""A prompt's attention output with its log-sum-exp, by the libraries' fused kernels; half precision on CUDA.

FlashAttention-2 makes it, and on a Hopper cuDNN that of long prompts, in about half of the time. Which of them does not
depend on the policy, so logits do not either.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from kvbench.kernels.dispatch import HOPPER, generation

# It makes a plan for every new length, in 40 to 50 ms (head size 128; 64 and 256 take ten times as long), and keeps it.
# 32 layers save 27 ms at 8,192 tokens, about 100 at this number.
_CUDNN_TOKENS = 16_384
_CUDNN_WIDTH = 128
_CUDNN_VERSION = 91_501  # older ones are wrong for lengths that are no multiple of 128, says torch, which avoids them
_refused: set[tuple[object, ...]] = set()


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
    if _cudnn_takes(query) and (states := (query.device, query.dtype, query.shape, keys.shape)) not in _refused:
        try:
            return _cudnn(query, keys, values, scaling)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            _refused.add(states)
            told = " ".join(str(error).split())[:200]
            warnings.warn(
                f"cuDNN refused queries {tuple(query.shape)}, so another kernel attends: {told}", stacklevel=2
            )
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

    For the devices and the head size that it was measured with, unless it is turned off
    (`torch.backends.cuda.enable_cudnn_sdp`).
    """
    if not query.is_cuda or query.shape[2] < _CUDNN_TOKENS or query.shape[-1] != _CUDNN_WIDTH:
        return False
    is_known = generation(query.device) == HOPPER and _cudnn_version() >= _CUDNN_VERSION
    return is_known and torch.backends.cuda.cudnn_sdp_enabled()


def _cudnn_version() -> int:
    return (torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None) or 0


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
