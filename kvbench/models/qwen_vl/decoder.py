"""The decoder of Qwen-VL, Qwen-7B: fused query-key-value with bias, a gated MLP in two halves, RMS norms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvbench.models.qwen_vl.rotary import query_scale, turned


class RootMeanSquareNorm(nn.Module):
    """x / rms(x) in float32, times a learned weight."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, states: Tensor) -> Tensor:
        """Normalise the last dimension."""
        wide = states.float()
        scaled = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.epsilon)
        return scaled.to(states.dtype) * self.weight


class QwenAttention(nn.Module):
    """Causal attention, through whatever function transformers' AttentionInterface has under the model's name."""

    is_causal = True

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_key_value_groups = 1
        self.scaling = config.kv_channels**-0.5
        self.c_attn = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.c_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=not config.no_bias)

    def forward(
        self,
        states: Tensor,
        *,
        positions: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: Any,
    ) -> Tensor:
        """Attend from `states` (B, Q, hidden) at `positions` (B, Q)."""
        fused = self.c_attn(states).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (-1, self.config.kv_channels)).transpose(1, 2) for part in fused)
        query, key = turned(query, *rotary), turned(key, *rotary)
        if self.config.use_logn_attn and not self.training:
            query = query * query_scale(positions, self.config.seq_length).to(query.dtype)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, plain_attention)
        mixed, _ = attend(self, query, key, value, mask, dropout=0.0, scaling=self.scaling)
        output: Tensor = self.c_proj(mixed.flatten(2))
        return output


def plain_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention in three steps, for `attn_implementation="eager"`; query (B, H, Q, D), additive mask."""
    logits = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        logits = logits + attention_mask
    weights = logits.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


class GatedMLP(nn.Module):
    """c_proj(w1(x) * silu(w2(x))); each half is half of the configured intermediate size."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        half, bias = config.intermediate_size // 2, not config.no_bias
        self.w1 = nn.Linear(config.hidden_size, half, bias=bias)
        self.w2 = nn.Linear(config.hidden_size, half, bias=bias)
        self.c_proj = nn.Linear(half, config.hidden_size, bias=bias)

    def forward(self, states: Tensor) -> Tensor:
        """Map (B, Q, hidden) to the same shape."""
        output: Tensor = self.c_proj(self.w1(states) * functional.silu(self.w2(states)))
        return output


class QwenBlock(nn.Module):
    """One pre-norm decoder layer."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.ln_1 = RootMeanSquareNorm(config.hidden_size, config.layer_norm_epsilon)
        self.attn = QwenAttention(config, layer_idx)
        self.ln_2 = RootMeanSquareNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mlp = GatedMLP(config)

    def forward(self, states: Tensor, **attention: Any) -> Tensor:
        """Map (B, Q, hidden) to the same shape; `attention` goes to the attention as it is."""
        states = states + self.attn(self.ln_1(states), **attention)
        return states + torch.as_tensor(self.mlp(self.ln_2(states)))
