"""When a decode step's decisions are taken: at once, or beside the model.

What a step decides in a layer, with the attention mass that it adds before, is wanted by the next step only: no later
layer of the step waits for it. So where steps are captured in a CUDA graph the decisions of a few layers at a time
branch off to a stream of their own and run beside the products of the layers that follow, and the step ends when both
have ended. The operations are the same, one after the other, and so are the victims. Branching off costs about 2 us on
an H200, naming a victim 4 to 20 us a layer (docs/log.md).

Everywhere else, where the host says one operation after the other, a decision is taken where it is asked for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import cache

import torch

Decision = Callable[[], None]
_LAYERS_TOGETHER = 4  # 1 and 8 are slower on an H200 (docs/log.md)
_beside: list[_Beside] = []


class _Beside:
    """The decisions of a step that is running: some wait for their branch, others may still be at work there.

    They are kept until both streams meet: what they read was allocated on the model's stream, which could else give it
    away while it is read.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, _stream(device)
        self._waiting: list[Decision] = []
        self._begun: list[Decision] = []

    def take(self, decision: Decision) -> None:
        self._waiting.append(decision)
        if len(self._waiting) == _LAYERS_TOGETHER:
            self._branch()

    def _branch(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        waiting, self._waiting = self._waiting, []
        self._begun += waiting
        with torch.cuda.stream(self._stream):
            for decision in waiting:
                decision()

    def end(self) -> None:
        """Take what still waits, and let the streams meet."""
        if self._waiting:
            self._branch()
        self.meet()

    def meet(self) -> None:
        """Let the model's stream wait for what has begun; what has not is forgotten."""
        self._waiting.clear()
        if self._begun:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
            self._begun.clear()


@contextlib.contextmanager
def decisions_beside(device: torch.device) -> Iterator[None]:
    """Inside, decisions run beside the current stream of `device`, a GPU, which at the end waits for them."""
    beside = _Beside(device)
    _beside.append(beside)
    try:
        yield
        beside.end()
    except BaseException:
        with contextlib.suppress(RuntimeError):  # in a capture that failed streams cannot meet; what failed it counts
            beside.meet()
        raise
    finally:
        _beside.remove(beside)


def decide(decision: Decision) -> None:
    """Take a layer's decision of this step, at once or beside the model."""
    if _beside:
        _beside[-1].take(decision)
    else:
        decision()


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
