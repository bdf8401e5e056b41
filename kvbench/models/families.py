"""Which families of checkpoints are supported, by the `model_type` of their configuration."""

from __future__ import annotations

VISION_FAMILIES = ("llava",)
TEXT_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
FAMILIES = (*VISION_FAMILIES, *TEXT_FAMILIES)
