"""Which checkpoint, told and checked before anything heavy is imported."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from kvbench.errors import ConfigError, close_matches
from kvbench.models.prompts import PROMPTS

BUNDLED = "bundled"
BUNDLED_FOLDER = Path(__file__).parent / "tiny_llava_scenes"
DTYPES = ("float32", "bfloat16", "float16")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_WHOLE_BYTES = 2**26
_BLOCK_BYTES = 2**16
_NUM_BLOCKS = 256


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A checkpoint: `bundled`, a local folder, or a hub name with its pinned revision.

    Only safetensors are read. trust_remote_code runs code of the checkpoint; it is never on unless
    said here. prompt: a prompt format by name, None for the checkpoint's own. Raises: ConfigError.
    """

    checkpoint: str
    revision: str | None = None
    dtype: str = "float32"
    trust_remote_code: bool = False
    prompt: str | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"model.dtype is {self.dtype!r}; {close_matches(self.dtype, DTYPES)}")
        if self.prompt is not None and self.prompt not in PROMPTS:
            raise ConfigError(f"model.prompt is {self.prompt!r}; {close_matches(self.prompt, PROMPTS)}")
        if self.folder is None:
            self._check_hub()
        else:
            _check_folder(self.folder)

    @property
    def folder(self) -> Path | None:
        """The local folder, None for a checkpoint on the hub."""
        if self.checkpoint == BUNDLED:
            return BUNDLED_FOLDER
        path = Path(self.checkpoint).expanduser()
        return path if path.is_dir() else None

    def _check_hub(self) -> None:
        if not _HUB_NAME.fullmatch(self.checkpoint) or self.checkpoint.startswith("."):
            raise ConfigError(
                f"model.checkpoint is {self.checkpoint!r}; it must be 'bundled', a folder that exists, "
                "or a hub name such as 'llava-hf/llava-1.5-7b-hf'"
            )
        if self.revision is None or not _COMMIT.fullmatch(self.revision):
            raise ConfigError(
                f"model.revision is {self.revision!r}; a hub checkpoint must be pinned to a commit of 40 hex digits "
                f"(its page lists them), or downloaded and given as a folder"
            )

    def fingerprint(self) -> str:
        """Return what the weights are: the hub commit, or a hash over the folder's files.

        Files over 64 MiB count by size and 256 blocks of 64 KiB spread evenly over them.
        """
        if self.folder is None:
            return f"{self.checkpoint}@{self.revision}"
        digest = hashlib.sha256()
        for path in sorted(self.folder.iterdir()):
            if path.suffix in (".json", ".safetensors", ".jinja", ".model", ".tiktoken", ".txt", ".py"):
                digest.update(path.name.encode() + _content_sample(path))
        return digest.hexdigest()


def _content_sample(path: Path) -> bytes:
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= _WHOLE_BYTES:
            return file.read()
        blocks = [str(size).encode()]
        for number in range(_NUM_BLOCKS):
            file.seek(number * (size - _BLOCK_BYTES) // (_NUM_BLOCKS - 1))
            blocks.append(file.read(_BLOCK_BYTES))
        return b"".join(blocks)


def _check_folder(folder: Path) -> None:
    config = folder / "config.json"
    if not config.is_file():
        raise ConfigError(f"model.checkpoint {folder} has no config.json; give a folder in Hugging Face format")
    try:
        json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{config} is not JSON ({error})") from error
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"model.checkpoint {folder} has no .safetensors file; kvbench reads no pickle. Convert it with "
            "model.save_pretrained(folder, safe_serialization=True)"
        )
