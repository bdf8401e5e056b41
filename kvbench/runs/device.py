"""Which device a run uses, checked before anything is loaded."""

from __future__ import annotations

import re
from typing import cast

import torch

from kvbench.errors import ConfigError, close_matches
from kvbench.runs.loop import ENGINES, Engine

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


def resolve_engine(asked: str, device: str) -> Engine:
    """Return "eager" or "graph"; "auto" takes the graph on a GPU. Raises: ConfigError."""
    on_gpu = device.startswith("cuda")
    if asked == "auto":
        return "graph" if on_gpu else "eager"
    if asked not in ENGINES:
        raise ConfigError(f"engine is {asked!r}; {close_matches(asked, ('auto', *ENGINES))}")
    if asked == "graph" and not on_gpu:
        raise ConfigError(f"engine is 'graph', which needs a CUDA device, but device is {device!r}; use engine=auto")
    return cast(Engine, asked)
