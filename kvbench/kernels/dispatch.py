"""Say whether a tensor's work goes to a Triton kernel or to plain torch, one rule for every kernel, and what they take.

Modules that import triton are imported only after `use_triton` said yes, so kvbench runs without it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, wraps
from importlib.util import find_spec
from typing import NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_WIDTH = 256  # numbers in a head that one tile of the prefill kernels holds
MAX_ROWS = 64  # batch of a decode step up to which the matrix kernels beat the library
_SHARED_BYTES = 227 * 2**10
HOPPER = 9  # of `generation`
_forced: list[bool] = []
_P = ParamSpec("_P")
_R = TypeVar("_R")


@cache
def triton_installed() -> bool:
    """Return whether triton can be imported."""
    return find_spec("triton") is not None


def interpreted() -> bool:
    """Return whether kernels run in Triton's interpreter: TRITON_INTERPRET=1, set before triton is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def use_triton(tensor: Tensor, *, any_dtype: bool = False) -> bool:
    """Return whether work on `tensor` goes to Triton: on CUDA, if it is installed, in a dtype kernels take.

    any_dtype: take it whatever it is. On the CPU never, but for `kernels_forced(True)` with the interpreter on.
    """
    if not (any_dtype or tensor.dtype in _DTYPES) or not triton_installed():
        return False
    if _forced:
        return _forced[-1] and (tensor.is_cuda or interpreted())
    return tensor.is_cuda


def is_decode_row(states: Tensor) -> bool:
    """Return whether `states` (B, 1, K) is the input of a decode step that the fused kernels take."""
    shape_fits = states.ndim == 3 and states.shape[1] == 1 and states.shape[0] <= MAX_ROWS
    return shape_fits and states.is_contiguous() and use_triton(states)


@contextmanager
def kernels_forced(to_triton: bool) -> Iterator[None]:
    """Inside, send work to Triton (True: on the CPU too, interpreted) or to the plain references (False).

    For tests, and for timing a kernel beside its reference.
    """
    _forced.append(to_triton)
    try:
        yield
    finally:
        _forced.pop()


def on_its_device(launcher: Callable[_P, _R]) -> Callable[_P, _R]:
    """Make the device of the first argument (a tensor, `Chunk` or `SlotColumns`) the current one while `launcher` runs.

    Triton launches on the current device whatever its arguments lie on; torch's own operations look at them.
    """

    @wraps(launcher)
    def launched(*args: _P.args, **options: _P.kwargs) -> _R:
        first = args[0]
        device = (first if isinstance(first, Tensor) else first.keys).device  # type: ignore[attr-defined]
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return launcher(*args, **options)
        with torch.cuda.device(device):
            return launcher(*args, **options)

    return launched


@cache
def num_processors(device: torch.device) -> int:
    """Return how many programs run side by side on `device`; some number where none does."""
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@cache
def shared_bytes(device: torch.device) -> int:
    """Return how much memory a program may have that its threads share; an H100's where `device` does not tell."""
    if device.type != "cuda":
        return _SHARED_BYTES
    return int(getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", _SHARED_BYTES))


@cache
def generation(device: torch.device) -> int:
    """Return the generation of an NVIDIA GPU, 9 for a Hopper; 0 for any other device."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 0
    return torch.cuda.get_device_capability(device)[0]


@cache
def has_tile_loads(device: torch.device) -> bool:
    """Return whether `device` has a unit that fetches tiles by itself, as NVIDIA's have from Hopper on.

    The interpreter plays it.
    """
    if find_spec("triton.tools.tensor_descriptor") is None:  # triton below 3.4
        return False
    return interpreted() if device.type != "cuda" else generation(device) >= HOPPER


def in_line(states: Tensor) -> Tensor:
    """Return `states` with the numbers of its last dimension side by side; a copy only if they are not."""
    return states if states.stride(-1) == 1 else states.contiguous()


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """Several new tokens attending: query (B, Hq, Q, D), keys and values (B, H, T, D).

    query_position (B, Q) and key_position (B, H, T) count a row's own tokens; -1 is a pad or an
    empty slot. The last Q entries of the keys are the chunk itself. `plain` says that the chunk is a
    whole prompt without pads, which the fused causal kernel takes as it is. left_pads: how many pads each row has, all
    left of its tokens, None where that is not known.
    """

    query: Tensor
    keys: Tensor
    values: Tensor
    query_position: Tensor
    key_position: Tensor
    scaling: float
    plain: bool
    left_pads: tuple[int, ...] | None = None

    @property
    def stored(self) -> int:
        """Entries that were there before the chunk."""
        return self.keys.shape[2] - self.query.shape[2]

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.query.shape[1] // self.keys.shape[1]


@dataclass(frozen=True, kw_only=True)
class SlotColumns:
    """A layer's slots as the kernels see them, all contiguous and changed in place.

    keys, values (B, H, C, D); position (B, H, C) int64, kind int8, mass float32 or None, rank int32 or
    None, and with it in_place (B, H) int32; length and free (B, H) int64; faults (B, H) int32.

    Ragged: keys, values (N, D) and columns (N,), where `start` (B, H) int64 says at which slot a head begins, and
    `spread` (B, H) int64 how many entries more than its row it may hold; capacity: slots of the largest head.
    """

    keys: Tensor
    values: Tensor
    position: Tensor
    kind: Tensor
    mass: Tensor | None
    rank: Tensor | None
    in_place: Tensor | None
    length: Tensor
    free: Tensor
    faults: Tensor
    capacity: int
    start: Tensor | None = None
    spread: Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Unturned:
    """The rotary rotation of keys that waits for whoever writes them, and that of `queries` (B, Hq, 1, D) beside it.

    cosines, sines (B or 1, 1, D); turned_queries (B, Hq, 1, D), dense, is where the turned ones are awaited.
    """

    queries: Tensor
    cosines: Tensor
    sines: Tensor
    turned_queries: Tensor

    @property
    def table_row(self) -> int:
        """Numbers from one row's angles to the next one's, 0 where all rows share them."""
        return 0 if self.cosines.shape[0] == 1 else self.cosines.stride(0)


class Norm(NamedTuple):
    """An RMSNorm that waits for whoever multiplies: weight (K,), epsilon."""

    weight: Tensor
    epsilon: float


_UNTURNED = "kvbench_unturned"


def leave_unturned(keys: Tensor, unturned: Unturned) -> Tensor:
    """Return `keys`, which tell whoever takes the very same object what is still to be done to them."""
    setattr(keys, _UNTURNED, unturned)
    return keys


def take_unturned(keys: Tensor) -> Unturned | None:
    """Return what is still to be done to `keys`, once; None for nothing."""
    unturned: Unturned | None = keys.__dict__.pop(_UNTURNED, None)
    return unturned
