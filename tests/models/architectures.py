"""The architectures written in conf/model, as they are and shrunk to a size that runs in a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from kvbench.models.spec import ModelSpec

_YAMLS = sorted((Path(__file__).parents[2] / "conf" / "model").glob("*.yaml"))
_CONFIGS: dict[str, Any] = {path.stem: OmegaConf.to_container(OmegaConf.load(path)) for path in _YAMLS}
SMALL = tuple(name for name, content in _CONFIGS.items() if content["config"] is not None)
_TEXT = {"vocab_size": 301, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
_HEADS = {1: (4, 4), 4: (8, 2), 7: (7, 1), 8: (8, 1)}  # query heads, KV heads, by query heads per KV head
_VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
_PICTURE = {"image_size": 28, "patch_size": 14}


def architecture_of(name: str) -> dict[str, Any]:
    """Return the fields of a yaml's `config`, a copy."""
    config: dict[str, Any] = OmegaConf.to_container(OmegaConf.create(_CONFIGS[name]["config"]))  # type: ignore[assignment]
    return config


def small_architecture(name: str) -> dict[str, Any]:
    """Return the same with few layers and small widths; group size, rope, ties and layout stay."""
    config = architecture_of(name)
    text = config.get("text_config", config)
    query_heads, kv_heads = _HEADS[text["num_attention_heads"] // text["num_key_value_heads"]]
    text |= _TEXT | {"num_attention_heads": query_heads, "num_key_value_heads": kv_heads}
    text["hidden_size"] = 8 * query_heads if query_heads == 7 else 64
    if "vision_config" in config:
        config["vision_config"] |= _VISION | _PICTURE
        config |= {"image_token_index": 300, "image_seq_length": 4}
    return config


def small_spec(name: str, **options: Any) -> ModelSpec:
    """Return the small architecture with random weights."""
    arguments = {"checkpoint": "none/none", "dtype": "float32", **options}
    return ModelSpec(weights="random", config=small_architecture(name), **arguments)
