"""What deciding costs at a decode step: the policy's own work, alone."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from kvbench.cache import Policy
from kvbench.cache.layer import evicts_at_decode
from kvbench.errors import PolicyError, ran_out_of_memory
from kvbench.metrics.clock import Marks
from kvbench.runs.capture import captured, warm_up
from kvbench.stats.intervals import Interval

if TYPE_CHECKING:
    from kvbench.cache import PolicyCache

_NUM_REPEATS = 15


def deciding_ms(cache: PolicyCache, policy: Policy, device: torch.device) -> Interval:
    """Return the median time in which all layers name their victims; nothing is applied.

    On CUDA the work is captured in a CUDA graph and replayed, so that launching it costs nothing; what
    cannot be captured is run as it is, and the method says so. 0 for a policy that decides nothing.
    """
    if not evicts_at_decode(policy):
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
    try:
        warm_up(cache.decide, device)
        graph = captured(cache.decide, device)
    except (PolicyError, RuntimeError) as error:  # a copy from the host, or a wait for the device
        if ran_out_of_memory(error):
            raise
        torch.cuda.synchronize(device)
        return cache.decide, "launched kernel by kernel"
    return graph.replay, "CUDA graph"
