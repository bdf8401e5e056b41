"""A model of random weights from a written configuration: no checkpoint, no tokenizer, no copy on the CPU.

What a decode step costs in time and memory does not depend on the values of the weights, so speed
and memory of an architecture can be measured without downloading it.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from kvbench.errors import ConfigError, close_matches

_STANDARD_DEVIATION = 0.02


def architecture(config: Mapping[str, Any]) -> Any:
    """Return the transformers config of `config`, its fields by name, `model_type` among them.

    Raises: ConfigError for a field that the family does not have, which transformers would keep unread.
    """
    transformers = importlib.import_module("transformers")
    fields = dict(config)
    try:
        made = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    except Exception as error:  # transformers and its validators raise many kinds
        raise ConfigError(f"model.config makes no model: {' '.join(str(error).split())}") from error
    _check_fields(made, fields, "model.config")
    return made


def _check_fields(made: Any, fields: Mapping[str, Any], path: str) -> None:
    default = type(made)()
    for name, value in fields.items():
        if not hasattr(default, name):
            raise ConfigError(
                f"{path}.{name} is no field of {type(made).__name__}; {close_matches(name, vars(default))}"
            )
        if isinstance(value, Mapping) and name.endswith("_config"):
            _check_fields(getattr(made, name), value, f"{path}.{name}")


def random_model(config: Any, *, vision: bool, dtype: torch.dtype, device: torch.device, seed: int) -> Any:
    """Return the model of a transformers config, built on `device` in `dtype` and filled there.

    Norms are the identity, everything else is normal with deviation 0.02, drawn from `seed`: the same
    device gives the same weights, another kind of device others. Buffers (rotary frequencies) are real.
    On the device "meta" nothing is allocated, which serves to count parameters.
    """
    transformers = importlib.import_module("transformers")
    auto = transformers.AutoModelForImageTextToText if vision else transformers.AutoModelForCausalLM
    with device:
        model = auto.from_config(config, dtype=dtype)
    if device.type != "meta":
        _fill(model, torch.Generator(device).manual_seed(seed))
    return model


@torch.no_grad()
def _fill(model: nn.Module, generator: torch.Generator) -> None:
    """Fill every parameter in place; a tied one is met once, as `parameters` counts it."""
    identity = {id(p) for module in model.modules() if _is_norm(module) for p in module.parameters(recurse=False)}
    for name, parameter in model.named_parameters():
        if id(parameter) in identity:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            parameter.normal_(std=_STANDARD_DEVIATION, generator=generator)


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__
