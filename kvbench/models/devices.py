"""One model over several GPUs: which may be asked for, which module lies where, and what crosses between them.

accelerate decides and moves: `infer_auto_device_map` cuts between the model's blocks, as evenly as they allow, and
`dispatch_model` puts a hook before every block that brings its inputs along. Two things are added. What all layers of
a device read (rotary angles, masks) crosses once a pass and not once a layer, and modules inside a block, which lie
where the block lies, are called without a hook. Nothing here waits for a device: a copy between two of them is queued
on both.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kvbench.errors import ConfigError, ModelSupportError

if TYPE_CHECKING:  # a wrong setting is told before torch is imported, which takes seconds
    import torch
    from torch import Tensor, nn

MAX_DEVICES = 8  # as many as kvbench.measures has names for
Devices = Literal["auto"] | tuple[int, ...] | None
_ALLOWED = "it must be null (one device), auto (all GPUs), or a list of different GPU numbers such as [0,1]"
_GIB = 2**30


def checked_devices(asked: object) -> Devices:
    """Return `model.devices` as it is kept, a list in ascending order. Raises: ConfigError."""
    if asked is None or asked == "auto":
        return None if asked is None else "auto"
    listed = list(asked) if isinstance(asked, list | tuple) else []
    if not listed or not all(type(number) is int and number >= 0 for number in listed):
        raise ConfigError(f"model.devices is {asked!r}; {_ALLOWED}")
    twice = next((number for number in listed if listed.count(number) > 1), None)
    if twice is not None:
        raise ConfigError(f"model.devices is {asked!r}, which names GPU {twice} more than once; {_ALLOWED}")
    return tuple(sorted(listed))


def chosen_devices(asked: Literal["auto"] | tuple[int, ...], num_gpus: int) -> tuple[int, ...]:
    """Return the numbers of the GPUs that `asked` means where there are `num_gpus`. Raises: ConfigError."""
    shown = asked if asked == "auto" else list(asked)
    if num_gpus == 0:
        raise ConfigError(f"model.devices is {shown!r}, but torch sees no CUDA device; leave model.devices out")
    numbers = tuple(range(num_gpus)) if asked == "auto" else tuple(int(number) for number in asked)
    if numbers[-1] >= num_gpus:
        there = "0" if num_gpus == 1 else f"0 to {num_gpus - 1}"
        raise ConfigError(
            f"model.devices is {shown!r}, but torch sees {num_gpus} CUDA device{'s' * (num_gpus > 1)} (GPU {there}); "
            "name those, or use model.devices=auto"
        )
    if len(numbers) > MAX_DEVICES:
        raise ConfigError(
            f"model.devices is {shown!r}, which are {len(numbers)} GPUs; each is reported by itself, and at "
            f"most {MAX_DEVICES} are: list so many"
        )
    if len(numbers) > 1 and find_spec("accelerate") is None:
        raise ConfigError(
            f"model.devices is {shown!r}, and a model over several GPUs needs the package accelerate; "
            "pip install 'kvbench[devices]'"
        )
    return numbers


def free_bytes(device: torch.device) -> int:
    """Return the memory of `device` that nothing alive uses."""
    import torch

    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    with suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def placement(model: nn.Module, free: Mapping[int, int], *, told: str) -> dict[str, int]:
    """Return the device number of each block of `model`, which may lie on "meta"; messages call it `told`.

    free: bytes by device number. Modules without weights lie on the first device, where positions and masks are made.
    Raises: ModelSupportError if the weights do not fit, block by block.
    """
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    whole: Any = model._no_split_modules or []
    with _quietly():
        most = get_balanced_memory(model, dict(free), no_split_module_classes=list(whole))
        found = infer_auto_device_map(model, most, no_split_module_classes=list(whole))
    if any(not isinstance(where, int) for where in found.values()):
        need = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        there = ", ".join(f"cuda:{number} has {size / _GIB:.1f} GiB free" for number, size in free.items())
        raise ModelSupportError(
            f"{told} has {need / _GIB:.1f} GiB of weights, which fit no split between its blocks ({there}); give more "
            "GPUs in model.devices, or a narrower model.dtype"
        )
    first = min(free)
    return {
        name: int(where) if any(True for _ in model.get_submodule(name).parameters()) else first
        for group, where in found.items()
        for name in _called(model, group)
    }


def _called(model: nn.Module, name: str) -> list[str]:
    """Return the modules of `name` that are called: of a list, which never is, so that no hook of it runs, its own."""
    from torch import nn

    module = model.get_submodule(name)
    if not isinstance(module, nn.ModuleList | nn.ModuleDict):
        return [name]
    return [found for child, _ in module.named_children() for found in _called(model, f"{name}.{child}")]


@contextmanager
def _quietly() -> Iterator[None]:
    """Without accelerate's warnings of what is told here in one line, or is no fault on a machine without a GPU."""
    log = logging.getLogger("accelerate")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def place_of(name: str, places: Mapping[str, int]) -> int:
    """Return the device number of the parameter or module `name`."""
    while name not in places:
        name = name.rpartition(".")[0]
    return places[name]


def spread(model: nn.Module, places: Mapping[str, Any], main: Any) -> nn.Module:
    """Let the blocks of `model` run where `places` has them; inputs and outputs are on `main`.

    Weights that lie there already are not copied, buffers are. A fused model is spread after `fuse`: hooks hold the
    forward that they find.
    """
    from accelerate import dispatch_model
    from accelerate.hooks import remove_hook_from_module

    skipped = sorted(getattr(model, "_skip_keys_device_placement", None) or ())
    with _quietly():
        dispatch_model(model, dict(places), main_device=main, skip_keys=skipped, force_hooks=True)
    for name, module in model.named_modules():
        if name and name not in places:
            remove_hook_from_module(module)
    crossing = Crossing()
    model.register_forward_pre_hook(crossing.forget)
    model.register_forward_hook(crossing.forget, always_call=True)
    for name, where in places.items():
        if where != main:
            model.get_submodule(name).register_forward_pre_hook(crossing.before(where), with_kwargs=True)
    return model


def gathered(model: nn.Module) -> nn.Module:
    """Take the hooks off that loading put before every module, and leave the weights where they are."""
    from accelerate.hooks import remove_hook_from_submodules

    remove_hook_from_submodules(model)
    for module in model.modules():
        module.__dict__.pop("forward", None)  # left behind; it would hide the forward of a fused class
    return model


class Crossing:
    """Copies of the keyword arguments that all blocks of a device are given, made once a pass."""

    def __init__(self) -> None:
        self._copies: dict[tuple[int, Any], tuple[Tensor, Tensor]] = {}

    def forget(self, *_: Any) -> None:
        """Let the copies of a pass go: the next one may change what they were made of in place."""
        self._copies.clear()

    def before(self, device: Any) -> Any:
        """Return a hook that gives a block on `device` the copies that are there already."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
            return args, {name: self._on(value, device) for name, value in kwargs.items()}

        return hook

    def _on(self, value: Any, device: Any) -> Any:
        if hasattr(value, "device") and hasattr(value, "to"):
            if (id(value), device) not in self._copies:  # the tensor is kept too, so its id is nobody else's
                self._copies[id(value), device] = (value, value.to(device))
            return self._copies[id(value), device][1]
        if type(value) in (tuple, list):
            return type(value)(self._on(item, device) for item in value)
        return value
