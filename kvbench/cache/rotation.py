"""Turn rotary keys and queries by a difference of positions, from an unshifted copy.

Position modes other than `original` need keys as if they stood elsewhere. Stored keys stay as the
model rotated them; each step turns a temporary copy in float32 by (wanted - original). Stepwise
rotation in place is what diverges (relative error 6.7 after 2000 steps in bfloat16).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvbench.errors import ModelSupportError

_FIXED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_HALF_SPLIT_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # others may rotate neighbouring pairs
_GRID_FAMILIES = ("qwen2_5_vl_text", "qwen3_vl_text")  # time, row and column of a picture's token


@dataclass(frozen=True, kw_only=True, slots=True)
class Rotation:
    """Rotary embedding of the half-split kind (Llama, Qwen, Mistral); frequencies (D / 2,).

    most_tokens: up to how many tokens of a row the frequencies hold, None for any number.
    """

    frequencies: Tensor
    most_tokens: int | None = None

    def turn(self, states: Tensor, by: Tensor) -> Tensor:
        """Return `states` (..., T, D) turned by `by` (..., T) positions, in the dtype of `states`."""
        angles = by[..., None].float() * self.frequencies.to(by.device)
        cos, sin = angles.cos(), angles.sin()
        half = self.frequencies.shape[0]
        first, second, rest = states.float().tensor_split((half, 2 * half), dim=-1)
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)
        return turned.to(states.dtype)

    def tables(self, num_positions: int) -> tuple[Tensor, Tensor]:
        """Return cosines and sines (num_positions, D / 2) float32 of turning by 0, 1, ... positions."""
        by = torch.arange(num_positions, device=self.frequencies.device)
        angles = by[:, None].float() * self.frequencies
        return angles.cos(), angles.sin()


def rotation_of(decoder: Any, mode: str = "in_cache") -> Rotation:
    """Return the rotation of a transformers decoder, for the position mode `mode`.

    One that is fixed up to its training length says so itself (`fixed_rotation`, the original Qwen-VL).
    Raises: ModelSupportError where positions are not one fixed rotation (M-RoPE, dynamic NTK, LongRoPE,
    rotary frequencies per layer type), or pairs may not be half-split.
    """
    rotary = getattr(decoder, "rotary_emb", None)
    fixed_rotation = getattr(rotary, "fixed_rotation", None)
    if fixed_rotation is not None:
        frequencies, most_tokens = fixed_rotation()
        return Rotation(frequencies=frequencies, most_tokens=most_tokens)
    config = decoder.config
    rope = getattr(config, "rope_parameters", None) or {}
    kind = getattr(rotary, "rope_type", None)
    if config.model_type in _GRID_FAMILIES:
        raise ModelSupportError(
            f"positions=in_cache is not defined for {config.model_type!r}: a picture's token stands at a time, a row "
            "and a column, and ranks in the cache have one axis. Use positions=original"
        )
    if rotary is None or not hasattr(rotary, "inv_freq") or kind not in _FIXED_ROPE_TYPES or "mrope_section" in rope:
        raise ModelSupportError(
            f"positions={mode} needs one fixed rotary embedding; {type(decoder).__name__} has rope type {kind!r}. "
            "Use positions=original"
        )
    if config.model_type not in _HALF_SPLIT_FAMILIES:
        raise ModelSupportError(
            f"positions={mode} is implemented for {', '.join(_HALF_SPLIT_FAMILIES)}; the decoder is of family "
            f"{config.model_type!r}. Use positions=original"
        )
    return Rotation(frequencies=rotary.inv_freq.detach().float())
