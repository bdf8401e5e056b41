"""Which families of checkpoints are supported, by the `model_type` of their configuration."""

from __future__ import annotations

GRID_FAMILIES = ("qwen2_5_vl", "qwen3_vl")  # a picture's tokens are counted by its grid of patches
PORTED_FAMILIES = ("qwen",)  # the original Qwen-VL, a model class of our own
FIXED_PICTURE_FAMILIES = ("llava", *PORTED_FAMILIES)  # every picture is as many tokens, whatever its size
VISION_FAMILIES = ("llava", "llava_next", "llava_onevision", *GRID_FAMILIES, *PORTED_FAMILIES)
TEXT_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
FAMILIES = (*VISION_FAMILIES, *TEXT_FAMILIES)
RANDOM_FAMILIES = ("llava", *TEXT_FAMILIES)  # those that random weights and random pictures are drawn for
MOVING_ROTATIONS = ("dynamic", "longrope")  # rotary kinds whose angles follow the length so far
