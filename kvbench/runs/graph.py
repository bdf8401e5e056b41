"""The decode step captured in a CUDA graph: one launch a token, whatever the policy.

The graph holds the unmodified model's forward over the slot cache, the policy's choice of victim
included; every number that changes from step to step lives on the device. What a step would do on the
host, counting, is caught up with after each launch. `engine: eager` runs the very same operations one by one
and is the reference.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvbench.errors import ModelSupportError
from kvbench.models.loader import LoadedModel
from kvbench.models.spec import MOVING_ROTATIONS
from kvbench.runs.capture import captured, warm_up
from kvbench.runs.loop import Decoding

if TYPE_CHECKING:
    from kvbench.cache.cache import CacheState


def check_rotary(model: Any) -> None:
    """Raise ModelSupportError for rotary positions that follow the length so far: models look at it on the host."""
    kinds = getattr(getattr(model.get_decoder(), "rotary_emb", None), "rope_type", None)
    for kind in kinds.values() if isinstance(kinds, dict) else [kinds]:
        if kind in MOVING_ROTATIONS:
            raise ModelSupportError(
                f"engine=graph does not capture rotary positions of kind {kind!r}, whose angles follow the length so "
                "far; use engine=eager"
            )


class GraphDecoding(Decoding):
    """A `Decoding` that replays its step. `logits` are overwritten by the next step.

    The graph is captured by `prepare`, or by the first step, and once more after each `extend`. After the steps
    that were announced (`reserve_tokens`) buffers would have to grow, so further steps run one by one.
    """

    _graph: torch.cuda.CUDAGraph | None = None
    _replays_left = 0

    def __init__(self, loaded: LoadedModel, *arguments: Any, **options: Any) -> None:
        """Take the prompt as `Decoding` does. Raises: ModelSupportError for a model whose step cannot be captured."""
        check_rotary(loaded.model)
        super().__init__(loaded, *arguments, **options)

    def extend(self, tokens: Tensor) -> Tensor:
        """Feed a chunk as `Decoding` does; the next step is captured anew, over the buffers that the cut laid out."""
        self._graph = None
        return super().extend(tokens)

    def prepare(self) -> None:
        """Capture the step. Steps are run for warm-up and undone, so nothing is seen of them afterwards.

        Raises: PolicyError if a step waits for the device.
        """
        if self._graph is not None or self.cache.steps_announced < 1:
            return
        self._replays_left = self.cache.steps_announced
        counts = self._warmed_up()
        self._beat()
        self._graph = captured(self._keep_logits, self._tokens.device)
        self._beat()
        self.cache.restore(counts)

    def _warmed_up(self) -> CacheState:
        """Return the counts on the host as they were; copies of tensors are let go, so that no graph is held up."""
        before = self.cache.snapshot()
        state = [self._tokens.clone(), self._position.clone()]

        def undo() -> None:
            self.cache.restore(before)
            for tensor, old in zip((self._tokens, self._position), state, strict=True):
                tensor.copy_(old)
            self._beat()

        warm_up(self._forward, self._tokens.device, undo=undo)
        return replace(before, tensors=[], values=[])

    def _keep_logits(self) -> None:
        self._captured = self._forward()

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
        self._beat()
        return self.logits
