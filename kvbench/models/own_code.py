"""Code that comes with a checkpoint: run only on request, and only from the place that is pinned."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvbench.errors import ConfigError

_FILES = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")


def check_folder_code(folder: Path) -> None:
    """Raise ConfigError if a settings file in `folder` takes code from another repository, which nothing pins."""
    for path in filter(Path.is_file, (folder / name for name in _FILES)):
        check_code_place(json.loads(path.read_text(encoding="utf-8")), str(path))


def check_hub_code(source: str, revision: str | None) -> None:
    """Do the same for a checkpoint on the hub; fetches settings and runs nothing. Raises: ConfigError."""
    from transformers import PretrainedConfig
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    config, _ = PretrainedConfig.get_config_dict(source, revision=revision)
    check_code_place(config, f"config.json of {source}")
    check_code_place(get_tokenizer_config(source, revision=revision), f"tokenizer_config.json of {source}")


def check_code_place(settings: Any, where: str) -> None:
    """Raise ConfigError if `auto_map` in `settings`, read from `where`, names code of another repository."""
    auto_map = settings.get("auto_map", {}) if isinstance(settings, dict) else {}
    for name in _texts(auto_map):
        if "--" in name:
            raise ConfigError(
                f"{where} takes code from another repository ({name}), which model.trust_remote_code does not "
                "cover, as nothing pins it; copy the checkpoint and that code into one folder and name the code there"
            )


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)
