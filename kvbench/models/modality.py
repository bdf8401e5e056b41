"""Whether a model takes pictures, from its configuration, before anything heavy is imported."""

from __future__ import annotations

from kvbench.models.families import VISION_FAMILIES
from kvbench.models.spec import ModelSpec

_VISION_PARTS = ("vision_config", "visual")


def takes_images(spec: ModelSpec) -> bool | None:
    """Return whether the model has a vision part; None for one on the hub, which is not at hand."""
    config = spec.known_config()
    if config is None:
        return None
    return config.get("model_type") in VISION_FAMILIES or any(config.get(part) is not None for part in _VISION_PARTS)
