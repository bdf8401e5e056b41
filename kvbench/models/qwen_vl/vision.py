"""The vision tower of Qwen-VL: an OpenCLIP ViT-bigG without class token, and a resampler to 256 vectors.

Learned positions of the tower are laid out for a grid of 16 x 16 patches and are interpolated
bicubically to the grid of the picture. The resampler is one cross attention of learned queries, with
fixed 2D sine-cosine positions on queries and keys (arXiv 2308.12966, Sec. 2.1).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_TRAINED_PATCHES = 256
_NORM_EPSILON = 1e-6
_RESAMPLER_HEAD_WIDTH = 128


class TowerAttention(nn.Module):
    """Full self-attention over patches; `in_proj` gives query, key and value of a head side by side."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, patches: Tensor) -> Tensor:
        """Attend: (N, P, width) to the same shape."""
        per_head = self.in_proj(patches).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        query, key, value = per_head.chunk(3, dim=-1)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        joined: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return joined


class TowerBlock(nn.Module):
    """One pre-norm layer of the tower."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        inner = int(width * mlp_ratio)
        self.ln_1 = nn.LayerNorm(width, eps=_NORM_EPSILON)
        self.ln_2 = nn.LayerNorm(width, eps=_NORM_EPSILON)
        self.attn = TowerAttention(width, heads)
        layers = (("c_fc", nn.Linear(width, inner)), ("gelu", nn.GELU()), ("c_proj", nn.Linear(inner, width)))
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, patches: Tensor) -> Tensor:
        """Map (N, P, width) to the same shape."""
        patches = patches + self.attn(self.ln_1(patches))
        return patches + torch.as_tensor(self.mlp(self.ln_2(patches)))


class Tower(nn.Module):
    """The tower's layers."""

    def __init__(self, width: int, layers: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(TowerBlock(width, heads, mlp_ratio) for _ in range(layers))

    def forward(self, patches: Tensor) -> Tensor:
        """Map (N, P, width) to the same shape."""
        for block in self.resblocks:
            patches = block(patches)
        return patches


class Resampler(nn.Module):
    """Cross attention of `num_queries` learned queries over the patches."""

    def __init__(self, width: int, patch_width: int, num_queries: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(num_queries, width))
        self.pos_embed = nn.Parameter(torch.zeros(num_queries, width), requires_grad=False)
        same = patch_width == width
        self.kv_proj = nn.Identity() if same else nn.Linear(patch_width, width, bias=False)
        self.attn = nn.MultiheadAttention(width, width // _RESAMPLER_HEAD_WIDTH, batch_first=True)
        self.ln_q = nn.LayerNorm(width, eps=_NORM_EPSILON)
        self.ln_kv = nn.LayerNorm(width, eps=_NORM_EPSILON)

    def forward(self, patches: Tensor) -> Tensor:
        """Map patches (N, P, patch_width) to (N, num_queries, width)."""
        values = self.ln_kv(self.kv_proj(patches))
        keys = values + on_grid(self.pos_embed, patches.shape[1])
        queries = (self.ln_q(self.query) + self.pos_embed).expand(len(patches), -1, -1)
        mixed: Tensor = self.attn(queries, keys, values, need_weights=False)[0]
        return mixed


class VisionTower(nn.Module):
    """Pictures to vectors of the decoder's width; made from `config.visual`."""

    def __init__(self, visual: dict[str, Any]) -> None:
        super().__init__()
        width, out = visual["width"], visual["output_dim"]
        patch, num_queries = visual["patch_size"], visual.get("n_queries", 256)
        self.conv1 = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=False)
        self.positional_embedding = nn.Parameter(torch.zeros(_TRAINED_PATCHES, width))
        self.ln_pre = nn.LayerNorm(width, eps=_NORM_EPSILON)
        self.transformer = Tower(width, visual["layers"], visual["heads"], visual["mlp_ratio"])
        self.attn_pool = Resampler(out, width, num_queries)
        self.ln_post = nn.LayerNorm(out, eps=_NORM_EPSILON)
        self.proj = nn.Parameter(torch.zeros(out, out))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Map pixels (N, 3, S, S) to (N, num_queries, output_dim)."""
        patches = self.conv1(pixel_values.to(self.proj.dtype)).flatten(2).transpose(1, 2)
        patches = self.ln_pre(patches + on_grid(self.positional_embedding, patches.shape[1]))
        vectors: Tensor = self.ln_post(self.attn_pool(self.transformer(patches))) @ self.proj
        return vectors


def on_grid(positions: Tensor, num_patches: int) -> Tensor:
    """Return `positions` (S x S, width), laid out row by row, interpolated to `num_patches` = T x T rows."""
    source, target = math.isqrt(len(positions)), math.isqrt(num_patches)
    if source == target:
        return positions
    square = positions.float().reshape(1, source, source, -1).permute(0, 3, 1, 2)
    resized = functional.interpolate(square, size=(target, target), mode="bicubic", align_corners=False)
    return resized[0].flatten(1).transpose(0, 1).to(positions.dtype)


def sine_positions(num_positions: int, width: int) -> Tensor:
    """Return fixed 2D positions (G x G, width): column in the first half, row in the second, sines before cosines."""
    edge = math.isqrt(num_positions)
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angles = torch.arange(edge, dtype=torch.float64)[:, None] * frequencies
    coded = torch.cat((angles.sin(), angles.cos()), dim=-1)
    columns, rows = coded[None].expand(edge, -1, -1), coded[:, None].expand(-1, edge, -1)
    return torch.cat((columns, rows), dim=-1).flatten(0, 1).float()
