"""Are a checkpoint's weights whole and those of its config: told by name, since what lacks would be random numbers.

Files are looked at by their headers, before anything heavy is imported; names and shapes by what
transformers says after loading. Format: https://github.com/huggingface/safetensors#format (8 bytes that
give the header's length, the header in JSON with the place of each tensor, the tensors).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from kvbench.errors import ConfigError, ModelSupportError

WEIGHTS, INDEX, ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_config.json"
SUFFIXES = (".json", ".safetensors", ".jinja", ".model", ".tiktoken", ".txt", ".py")  # what a checkpoint is made of
_POINTER = b"version https://git-lfs.github.com/spec/"
_LENGTH_BYTES = 8
_MOST_HEADER_BYTES = 10**8  # the format's own limit
_MOST_NAMES = 3
_DOWNLOAD = "download it again"
# Computed from the config, never learned; older checkpoints carry them, of the port's family too.
_BUFFERS = ("rotary_emb.inv_freq", "position_ids", "logn_tensor", "masked_bias")


def check_weight_files(folder: Path) -> None:
    """Raise ConfigError, one line, unless every file of the checkpoint in `folder` is there and whole.

    A file as long as it should be whose bytes are wrong is not found.
    """
    for path in sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES and path.is_file()):
        check_no_pointer(path)
        if path.suffix == ".json":
            _check_json(path, path.stat().st_size, path.stat().st_mtime_ns)
    check_no_adapter(folder)
    if (folder / WEIGHTS).is_file():
        _tensor_names(folder / WEIGHTS)
    elif (folder / INDEX).is_file():
        _check_shards(folder)
    else:
        found = sorted(path.name for path in folder.glob("*.safetensors"))
        raise ConfigError(
            f"model.checkpoint {folder} has no {WEIGHTS} and no {INDEX}, but {_some(found)}; "
            f"{_DOWNLOAD} with its index, or save it with model.save_pretrained(folder)"
        )


def check_no_pointer(path: Path) -> None:
    """Raise ConfigError if git left the pointer of git-lfs in the place of the file."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise ConfigError(
                f"{path} is a pointer of git-lfs and not the file itself; run `git lfs pull` in its folder, or "
                "download the file from the checkpoint's page"
            )


def check_no_adapter(folder: Path) -> None:
    """Raise ConfigError for the adapter (LoRA) of another checkpoint: alone no model, beside one it would be lost."""
    path = folder / ADAPTER
    if not path.is_file():
        return
    base = _object(path).get("base_model_name_or_path")
    how = "merge it into its base (peft: merge_and_unload, then save_pretrained) and give that folder"
    if (folder / "config.json").is_file():
        raise ConfigError(
            f"model.checkpoint {folder} holds an adapter of {base!r} beside its weights ({ADAPTER}), and kvbench loads "
            f"none; {how}, or move {ADAPTER} away to run without it"
        )
    raise ConfigError(f"model.checkpoint {folder} is an adapter of {base!r} ({ADAPTER}) without its base; {how}")


def check_loaded(source: str, info: Mapping[str, Any]) -> None:
    """Raise ModelSupportError if a tensor was missing, left over or of another shape when `source` was loaded.

    info: transformers' loading info; it leaves tied weights out by itself.
    """
    mismatched = {name: (found, asked) for name, found, asked in info["mismatched_keys"]}
    missing = _learned(name for name in info["missing_keys"] if name not in mismatched)
    left_over = _learned(info["unexpected_keys"])
    problems = []
    if mismatched:
        told = [
            f"{name} is {_shape(found)}, not {_shape(asked)}" for name, (found, asked) in sorted(mismatched.items())
        ]
        problems.append(f"holds {_tensors(told)} of other shapes than its config.json asks for ({_some(told)})")
    if missing:
        problems.append(f"lacks {_tensors(missing)} that its config.json asks for ({_some(missing)})")
    if left_over:
        problems.append(
            f"holds {_tensors(left_over)} that the model of its config.json does not have ({_some(left_over)})"
        )
    if problems:
        raise ModelSupportError(
            f"model.checkpoint {source} {', and '.join(problems)}, so a part of the model would be random numbers; "
            f"give the config.json that belongs to the weights, or {_DOWNLOAD}"
        )


@lru_cache(maxsize=2**10)  # a tokenizer has megabytes, and a sweep asks once per cell
def _check_json(path: Path, size_bytes: int, changed_ns: int) -> None:
    _object(path)


def _check_shards(folder: Path) -> None:
    places = _object(folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not places or not all(_is_name(file) for file in places.values()):
        raise ConfigError(f"{folder / INDEX} has no weight_map of tensors to files beside it; {_DOWNLOAD}")
    for file in sorted(set(places.values())):
        if not (folder / file).is_file():
            raise ConfigError(f"model.checkpoint {folder} lacks {file}, which {INDEX} names; download that file too")
        held = _tensor_names(folder / file)
        absent = next((name for name, place in sorted(places.items()) if place == file and name not in held), None)
        if absent is not None:
            raise ConfigError(f"{folder / file} does not hold {absent}, which {INDEX} says it does; {_DOWNLOAD}")


def _tensor_names(path: Path) -> Sequence[str]:
    """Return the tensors of a safetensors file. Raises: ConfigError unless it is as long as its header says."""
    size = path.stat().st_size
    broken = ConfigError(f"{path} is not a whole safetensors file ({size} bytes); {_DOWNLOAD}")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if not 0 < length <= min(_MOST_HEADER_BYTES, size - _LENGTH_BYTES):
            raise broken
        raw = file.read(length)
    try:
        header = {name: entry for name, entry in json.loads(raw).items() if name != "__metadata__"}
        told = _LENGTH_BYTES + length + max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise broken from error
    if size != told:
        raise ConfigError(f"{path} has {size} bytes, and its header tells of {told}; {_DOWNLOAD}")
    return list(header)


def _object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON ({error}); {_DOWNLOAD}") from error
    return content if isinstance(content, dict) else {}


def _is_name(file: Any) -> bool:
    return isinstance(file, str) and file not in ("", ".", "..") and Path(file).name == file


def _learned(names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if not name.endswith(_BUFFERS))


def _tensors(names: Sequence[str]) -> str:
    return "1 tensor" if len(names) == 1 else f"{len(names)} tensors"


def _shape(sizes: Iterable[int]) -> str:
    return " x ".join(map(str, sizes))


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more
