"""Capture work on a GPU in a CUDA graph, and leave nothing behind where that fails.

All captures of a device use one side stream: each further one would hold another workspace of the matrix
library for ever. An operation that waits for the device breaks a capture, and with it what the process
does later, so work is first run with waiting forbidden.
"""

from __future__ import annotations

import contextlib
import traceback
import warnings
from collections.abc import Callable, Iterator
from functools import cache

import torch

from kvbench.errors import PolicyError, ran_out_of_memory

_WAITS = "synchronizing CUDA operation"  # in the text of the error that torch's debug mode raises


def captured(work: Callable[[], None], device: torch.device) -> torch.cuda.CUDAGraph:
    """Return the graph of `work`, which `warm_up` has run before.

    Raises: what `work` raises; RuntimeError if it cannot be captured. Then the stream is the one from
    before and the graph's memory is given back, which torch does not do.
    """
    graph, pool, side = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle(), _side_stream(device)
    stream = torch.cuda.current_stream(device)
    try:
        with torch.cuda.graph(graph, pool=pool, stream=side):
            work()
    except RuntimeError as error:
        torch.cuda.set_stream(stream)
        with contextlib.suppress(RuntimeError):  # the capture was ended properly: the graph gives its memory back
            torch._C._cuda_endAllocateToPool(side.device_index, pool)
            torch._C._cuda_releasePool(side.device_index, pool)
        first = error.__context__  # ending a capture that ran out of memory raises another error over it
        if first is not None and ran_out_of_memory(first):
            raise first from error
        raise
    return graph


def warm_up(work: Callable[[], object], device: torch.device, *, undo: Callable[[], None] = lambda: None) -> None:
    """Run `work` twice on the side stream, undone each time: what is set up once, then as a capture runs it.

    Raises: PolicyError if it still waits for the device the second time.
    """
    side, stream = _side_stream(device), torch.cuda.current_stream(device)
    for waiting in (contextlib.nullcontext, _forbidden):
        side.wait_stream(stream)
        with torch.cuda.stream(side), waiting():
            work()
        stream.wait_stream(side)
        undo()


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def _forbidden() -> Iterator[None]:
    """Inside, waiting for the device is an error."""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():  # torch says, once, that its mode does not find every wait
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    except RuntimeError as error:
        if _WAITS not in str(error):
            raise
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise PolicyError(
            f"a decode step waits for the device ({place.line} in {place.name}), so it cannot be captured in a CUDA "
            "graph; keep what the policy computes on the device, or use engine=eager"
        ) from error
    finally:
        torch.cuda.set_sync_debug_mode(mode)
