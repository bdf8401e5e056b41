"""Whether a checkpoint takes pictures, read from its config.json before anything heavy is imported."""

from __future__ import annotations

import json

from kvbench.models.spec import ModelSpec

_VISION_PARTS = ("vision_config", "visual")


def takes_images(spec: ModelSpec) -> bool | None:
    """Return whether the checkpoint has a vision part; None for one on the hub, which is not at hand."""
    if spec.folder is None:
        return None
    config = json.loads((spec.folder / "config.json").read_text(encoding="utf-8"))
    return any(config.get(part) is not None for part in _VISION_PARTS)
