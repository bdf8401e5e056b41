"""The tiny Qwen-VL whose logits the published modelling code gave; weights come from names and a frozen generator."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

TRAINED_TOKENS = 32
PICTURE_START, PICTURE_TOKENS, PIXELS = 300, 16, 56
CONFIG: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "kv_channels": 32,
    "intermediate_size": 384,
    "seq_length": TRAINED_TOKENS,
    "max_position_embeddings": 1024,
    "visual": {
        "heads": 2,
        "image_size": PIXELS,
        "image_start_id": PICTURE_START,
        "layers": 2,
        "mlp_ratio": 4.9231,
        "output_dim": 256,
        "patch_size": 7,
        "width": 48,
        "n_queries": PICTURE_TOKENS,
    },
}


def golden_weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Random weights by tensor name; numpy's legacy generator gives the same numbers in every version.

    The resampler's fixed positions are left out: they are what each implementation computes.
    """
    weights = {}
    for name, shape in shapes.items():
        if name.endswith("pos_embed"):
            continue
        values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
        if len(shape) == 1:
            values = 0.2 * values + (1.0 if name.endswith("weight") else 0.0)
        else:
            values = values * (0.09 if name.endswith("c_attn.weight") else 0.06)
        weights[name] = torch.from_numpy(values).float()
    return weights


def golden_pixels(count: int) -> Tensor:
    """Pictures (count, 3, 56, 56) as they reach the vision tower."""
    values = np.random.RandomState(5).uniform(-2.0, 2.0, (count, 3, PIXELS, PIXELS))
    return torch.from_numpy(values).float()
