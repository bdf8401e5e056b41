"""Checkpoints of a training run as safetensors: weights, optimizer moments, and the step in the name."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from kvbench.durable import replacing

log = logging.getLogger("kvbench.train_scenes")


def save_state(
    out: Path, model: LlavaForConditionalGeneration, optimizer: torch.optim.Optimizer | None, step: int
) -> None:
    """Write weights and optimizer moments after `step` as safetensors, published by one rename; two are kept."""
    tensors = {f"model.{name}": value.contiguous() for name, value in model.state_dict().items()}
    state = optimizer.state_dict()["state"] if optimizer else {}
    for index, moments in state.items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in moments.items()}
    with replacing(out / f"state-{step:06d}.safetensors") as partial:
        save_file(tensors, partial, metadata={"step": str(step)})
    for old in sorted(out.glob("state-*.safetensors"))[:-2]:
        old.unlink()


def _latest(out: Path) -> Path | None:
    return max(out.glob("state-*.safetensors"), default=None)


def restore(out: Path, model: LlavaForConditionalGeneration) -> int | None:
    """Load the last checkpoint's weights into `model`; return its step, None if there is none."""
    path = _latest(out)
    if path is None:
        return None
    tensors = load_file(path)
    model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    log.info("going on from %s", path)
    return int(path.stem.removeprefix("state-"))


def restore_optimizer(out: Path, optimizer: torch.optim.Optimizer) -> None:
    """Load the last checkpoint's moments into `optimizer`, if there are any."""
    path = _latest(out)
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in (load_file(path) if path else {}).items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".")
            moments.setdefault(int(index), {})[name] = value
    if moments:
        optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
