"""The decode step captured in a CUDA graph: one launch a token, whatever the policy.

The graph holds the unmodified model's forward over the slot cache, the policy's choice of victim
included; every number that changes from step to step lives on the device. What a step would do on the
host, counting, is caught up with after each launch. `engine: eager` runs the very same operations one by one
and is the reference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvbench.runs.loop import Decoding


class GraphDecoding(Decoding):
    """A `Decoding` that replays its step. `logits` are overwritten by the next step.

    The graph is captured by `prepare`, or by the first step. After the steps that were announced
    (`reserve_tokens`) buffers would have to grow, so further steps run one by one.
    """

    _graph: torch.cuda.CUDAGraph | None = None
    _replays_left = 0

    def prepare(self) -> None:
        """Capture the step. One step is run for warm-up and undone, so nothing is seen of it afterwards."""
        if self._graph is not None or self.cache.steps_announced < 1:
            return
        self._replays_left = self.cache.steps_announced
        before = self.cache.snapshot()
        state = [self._tokens.clone(), self._position.clone()]
        stream = torch.cuda.Stream(self._tokens.device)
        stream.wait_stream(torch.cuda.current_stream(self._tokens.device))
        with torch.cuda.stream(stream):
            self._forward()
        torch.cuda.current_stream(self._tokens.device).wait_stream(stream)
        self._undo(before, state)
        self._graph = self._capture()
        self.cache.restore(before)

    def _capture(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._captured = self._forward()
        except RuntimeError as error:  # ending a capture that ran out of memory raises another error over it
            if isinstance(error.__context__, torch.OutOfMemoryError):
                raise error.__context__ from error
            raise
        return graph

    def _undo(self, before: Any, state: list[Tensor]) -> None:
        self.cache.restore(before)
        for tensor, old in zip((self._tokens, self._position), state, strict=True):
            tensor.copy_(old)

    def step(self, tokens: Tensor) -> Tensor:
        """Feed one token per row, (B,); return the next logits (B, V) float32, valid until the next step."""
        self.prepare()
        if self._graph is None or self._replays_left == 0:
            self._graph = None
            return super().step(tokens)
        self._replays_left -= 1
        self._tokens.copy_(tokens[:, None])
        self._graph.replay()
        self.cache.count_replayed_step()
        self.logits = self._captured
        return self.logits
