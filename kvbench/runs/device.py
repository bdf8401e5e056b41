"""Which device a run uses, checked before anything is loaded."""

from __future__ import annotations

import re

import torch

from kvbench.errors import ConfigError

_NAME = re.compile(r"cpu|cuda(:\d+)?")


def resolve_device(asked: str) -> str:
    """Return "cpu" or "cuda:N"; "auto" takes a GPU if there is one. Raises: ConfigError."""
    if asked == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    if not _NAME.fullmatch(asked):
        raise ConfigError(f"device is {asked!r}; it must be auto, cpu, cuda or cuda:N")
    if asked == "cpu":
        return asked
    number = int(asked.partition(":")[2] or 0)
    if number >= torch.cuda.device_count():
        raise ConfigError(
            f"device is {asked!r}, but torch sees {torch.cuda.device_count()} CUDA devices; use device=cpu"
        )
    return f"cuda:{number}"
