"""What only shows when settings are looked at together, or beside the machine; all before a model is loaded.

Types and ranges of single settings are checked where they are read; here are combinations of model, data
set and positions, the results folder, and secrets where none may be. Nothing is written and no network used.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvbench.datasets.base import Dataset
from kvbench.errors import ConfigError, close_matches
from kvbench.models.spec import FAMILIES, MOVING_ROTATIONS, TEXT_FAMILIES, ModelSpec, check_folder_code
from kvbench.models.weight_files import check_weight_files
from kvbench.results.redaction import is_secret_name, secret_in

_LONGEST_NAME = 200


def check_model(spec: ModelSpec, dataset: Dataset, positions: str, engine: str) -> None:
    """Raise ConfigError if the model cannot do what is asked of it, as far as its config.json is on this machine."""
    if spec.folder is not None and spec.revision is not None and not spec.is_random:
        raise ConfigError(
            f"model.revision is {spec.revision!r}, but model.checkpoint {spec.checkpoint} is a folder, which has no "
            "revisions; leave model.revision out"
        )
    config = known_config(spec)
    if config is None:
        return
    if spec.trust_remote_code and spec.folder is not None:
        check_folder_code(spec.folder)
    _check_family(spec, config)
    if spec.folder is not None and not spec.is_random:
        check_weight_files(spec.folder)
    family = config.get("model_type")
    if family in TEXT_FAMILIES and any(example.load_image is not None for example in dataset.examples()):
        raise ConfigError(
            f"the data set shows pictures, but model.checkpoint {spec.checkpoint} is of family {family!r}, which reads "
            "text only; choose a vision model (model=tiny-llava), or dataset=conversation with a file without images"
        )
    _check_rotation(spec, config, positions, engine)


def known_config(spec: ModelSpec) -> dict[str, Any] | None:
    """Return the model's architecture if it is on this machine: in the settings, its folder, or the hub's cache."""
    if spec.is_random:
        return spec.known_config()
    path: Any = spec.folder / "config.json" if spec.folder is not None else None
    if path is None:
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(spec.checkpoint, "config.json", revision=spec.revision)
    if not isinstance(path, str | Path) or not Path(path).is_file():
        return None
    config = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise ConfigError(f"{path} holds a {type(config).__name__}; it must be the JSON object of a model's settings")
    return config


def _check_family(spec: ModelSpec, config: Mapping[str, Any]) -> None:
    family = str(config.get("model_type"))
    if family in FAMILIES or spec.trust_remote_code:
        return
    if "auto_map" in config:
        raise ConfigError(
            f"model.checkpoint {spec.checkpoint} (family {family!r}) needs Python code of its own, which is not run "
            "unasked; read that code, then set model.trust_remote_code=true"
        )
    raise ConfigError(f"model.checkpoint {spec.checkpoint} is of family {family!r}; {close_matches(family, FAMILIES)}")


def _check_rotation(spec: ModelSpec, config: Mapping[str, Any], positions: str, engine: str) -> None:
    for rope in _rotations(config):
        kind, on_axes = rope.get("rope_type", rope.get("type")), "mrope_section" in rope
        moves = kind in MOVING_ROTATIONS
        if positions != "original" and (moves or on_axes):
            raise ConfigError(
                f"positions is {positions!r}, but model.checkpoint {spec.checkpoint} has rotary positions of kind "
                f"{'several axes (M-RoPE)' if on_axes else kind}, which have no rank in the cache; use "
                "positions=original"
            )
        if engine == "graph" and moves:
            raise ConfigError(
                f"engine is 'graph' (what auto takes on a GPU), but model.checkpoint {spec.checkpoint} has rotary "
                f"positions of kind {kind}, whose angles follow the length so far; use engine=eager"
            )


def _rotations(config: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    for part in (config, text or {}):
        for name in ("rope_parameters", "rope_scaling"):
            if isinstance(part.get(name), dict):
                yield part[name]


def check_settings(*cells: Mapping[str, Any]) -> None:
    """Raise ConfigError for a results folder or sweep name that cannot be used, or a secret in any cell's settings.

    `cells`: all settings of each cell, resolved; results and sweep are the same in all of them.
    """
    _check_results_folder(cells[0]["results"])
    _check_sweep_name(cells[0]["sweep"])
    seen: set[str] = set()
    for settings in cells:
        _check_no_secret(settings, seen)


def check_installed(error: Exception, target: str, name: str) -> None:
    """Raise ConfigError with the command to type if `error` says that the class `target` imports what is not there."""
    cause = error.__cause__
    missing = cause.name if isinstance(cause, ModuleNotFoundError) else None
    if missing is not None and not f"{target}.".startswith(f"{missing}."):
        package = missing.partition(".")[0]
        raise ConfigError(
            f"{name} needs the package {package!r}, which is not installed; python -m pip install {package}"
        ) from error


def _check_results_folder(asked: object) -> None:
    if not isinstance(asked, str) or not asked.strip():
        raise ConfigError(f"results is {asked!r}; it must be the path of a folder")
    try:
        folder = Path(asked).expanduser()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            folder.lstat()  # a name that is too long
        existing = next(parent for parent in (folder, *folder.absolute().parents) if os.path.lexists(parent))
        usable = existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"results is {asked[:80]!r}, which is no path ({error!s:.80}); give a folder") from error
    if not usable:
        why = "cannot be written to" if existing.is_dir() else "is not a folder"
        raise ConfigError(f"results is {asked!r}, but {existing} {why}; choose a folder that can be written to")


def _check_sweep_name(name: object) -> None:
    if not isinstance(name, str) or not name.strip() or not name.isprintable() or len(name) > _LONGEST_NAME:
        raise ConfigError(f"sweep is {str(name)[:60]!r}; it must be a name of 1 to {_LONGEST_NAME} printable letters")


def _check_no_secret(settings: Mapping[str, Any], seen: set[str]) -> None:
    """Look at every value that is not among `seen`, and add it: the cells of a sweep differ in few."""
    for key, value in _leaves(settings, ""):
        text = str(value)
        source = secret_in(text) if text not in seen else None
        seen.add(text)
        if source is not None:
            raise ConfigError(
                f"{key} holds the secret of {source}, and settings are stored and sent; leave it out, libraries "
                "find their keys in the environment by themselves"
            )


def check_no_secret_override(overrides: Sequence[str]) -> None:
    """Raise ConfigError for KEY=VALUE where KEY names a secret: others on this machine can read a command line."""
    for word in overrides:
        key, equals, value = word.partition("=")
        key = key.lstrip("+~")
        if equals and value not in ("", "null") and is_secret_name(key):
            raise ConfigError(
                f"{key} is given on the command line, where others can read it; put secrets into the environment "
                "(WANDB_API_KEY, HF_TOKEN), and take this one as known to others"
            )


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _leaves(item, f"{path}.{name}" if path else str(name))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{path}[{index}]")
    else:
        yield path, value
