"""Stands in for a CUDA graph on a CPU: a replay runs the step while everything on the host stands still."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kvbench.tasks import decode as graph
from kvbench.tasks.decode import Decoding


class FrozenReplay:
    """Stands in for a captured graph of `work`."""

    def __init__(self, decoding: Decoding, work: Callable[[], None]) -> None:
        self._layers = decoding.cache.policy_layers
        self._work = work
        self._frozen = [copy.deepcopy(layer.ledger) for layer in self._layers]

    def replay(self) -> None:
        now = [layer.ledger for layer in self._layers]
        before = self._addresses()
        for layer, ledger in zip(self._layers, self._frozen, strict=True):
            layer.ledger = copy.deepcopy(ledger)
        self._work()
        for layer, ledger in zip(self._layers, now, strict=True):
            layer.ledger = ledger
        assert self._addresses() == before, "a captured step changes tensors in place only"

    def _addresses(self) -> list[int]:
        return [tensor.data_ptr() for layer in self._layers for tensor in layer.state()]


def freeze_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let engine=graph replay on the CPU with a host that stands still."""

    def captured(work: Any, device: torch.device) -> FrozenReplay:
        return FrozenReplay(work.__self__, work)

    def warm_up(work: Callable[[], object], device: torch.device, *, undo: Callable[[], None]) -> None:
        work()
        undo()

    monkeypatch.setattr(graph, "captured", captured)
    monkeypatch.setattr(graph, "warm_up", warm_up)
