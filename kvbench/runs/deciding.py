"""What deciding costs at a decode step: the policy's own work, alone."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from kvbench.cache import Policy, PolicyCache, When
from kvbench.metrics.clock import Marks
from kvbench.metrics.intervals import Interval

_NUM_REPEATS = 15


def decides_at_decode(policy: Policy) -> bool:
    """Return whether the policy names victims while tokens are generated."""
    return policy.bounded and When.DECODE in policy.when


def deciding_ms(cache: PolicyCache, policy: Policy, device: torch.device) -> Interval:
    """Return the median time in which all layers name their victims; nothing is applied.

    On CUDA the work is captured in a CUDA graph and replayed, so that launching it costs nothing; what
    cannot be captured is run as it is, and the method says so. 0 for a policy that decides nothing.
    """
    if not decides_at_decode(policy):
        return Interval(value=0.0, low=None, high=None, n=1, method="nothing is decided at decode")
    work, how = (cache.decide, "run") if device.type != "cuda" else _captured(cache, device)
    work()
    marks = Marks(device)
    for _ in range(_NUM_REPEATS):
        marks.mark()
        work()
    marks.mark()
    median = statistics.median(marks.between_ms())
    return Interval(value=median, low=None, high=None, n=_NUM_REPEATS, method=f"median of repeats, {how}")


def _captured(cache: PolicyCache, device: torch.device) -> tuple[Callable[[], None], str]:
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            cache.decide()
    torch.cuda.current_stream(device).wait_stream(side)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            cache.decide()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # a copy from the host, or a wait for the device, cannot be captured
        torch.cuda.synchronize(device)
        return cache.decide, "launched kernel by kernel"
    return graph.replay, "CUDA graph"
