"""Positions on three axes, where a family counts a picture's tokens by time, row and column."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class GridPositions:
    """Positions of prompts as the model's own `get_rope_index` counts them.

    prompt (3, B, T) int64. offset (B, 1) int64: from a text token's index to its position on every
    axis once the prompt's pictures are behind it; a picture takes fewer positions than tokens.
    """

    prompt: Tensor
    offset: Tensor

    def without_last(self, num_tokens: int) -> GridPositions:
        """Return the same without the prompt's last tokens, which are text."""
        return replace(self, prompt=self.prompt[..., :-num_tokens])


def grid_positions(model: Any, tensors: Mapping[str, Tensor]) -> GridPositions | None:
    """Return the positions of the prompts in `tensors`, None for a family whose positions are the index."""
    count = getattr(getattr(model, "model", None), "get_rope_index", None)
    if count is None:
        return None
    names = ("input_ids", "attention_mask", "image_grid_thw", "mm_token_type_ids")
    prompt, offset = count(**{name: tensors[name] for name in names if name in tensors})
    return GridPositions(prompt=prompt, offset=offset)
