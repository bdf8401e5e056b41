"""Decisions beside the model: when they are taken, on which stream, and that nothing they read is let go before."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from functools import partial

import pytest
import torch

from kvbench.cache import decisions
from kvbench.cache.decisions import decide, decisions_beside

DEVICE = torch.device("cuda", 0)


class Stream:
    """One that notes what happens on it, in order."""

    def __init__(self, name: str, events: list[str]) -> None:
        self.name, self.events = name, events

    def wait_stream(self, other: Stream) -> None:
        self.events.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    noted: list[str] = []
    streams = [Stream("model", noted)]

    @contextlib.contextmanager
    def on(stream: Stream) -> Iterator[None]:
        streams.append(stream)
        yield
        streams.pop()

    beside = Stream("beside", noted)
    monkeypatch.setattr(decisions, "_stream", lambda device: beside)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: streams[-1])
    monkeypatch.setattr(torch.cuda, "stream", on)
    return noted


def take(events: list[str], layer: int) -> None:
    decide(partial(events.append, f"layer {layer}"))


def test_a_decision_is_taken_at_once_where_nothing_is_captured(events: list[str]) -> None:
    take(events, 0)
    assert events == ["layer 0"]


def test_a_few_layers_branch_off_together_and_the_step_waits_for_all(events: list[str]) -> None:
    with decisions_beside(DEVICE):
        for layer in range(6):
            take(events, layer)
            events.append(f"after {layer}")
    assert events == [
        *("after 0", "after 1", "after 2"),
        *("beside waits for model", "layer 0", "layer 1", "layer 2", "layer 3", "after 3"),
        *("after 4", "after 5"),
        *("beside waits for model", "layer 4", "layer 5", "model waits for beside"),
    ]
    take(events, 7)
    assert events[-1] == "layer 7"


def test_without_a_decision_no_stream_waits(events: list[str]) -> None:
    with decisions_beside(DEVICE):
        pass
    assert events == []


def test_what_a_decision_reads_is_kept_until_the_streams_meet(events: list[str]) -> None:
    alive: list[bool] = []
    with decisions_beside(DEVICE):
        for _ in range(4):
            tensor = torch.zeros(3)
            told = weakref.ref(tensor)
            decide(partial(torch.Tensor.add_, tensor, 1))
            del tensor
        alive.append(told() is not None)
    assert alive == [True]
    assert told() is None


def test_the_first_error_is_the_one_that_is_told(events: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Stream, other: Stream) -> None:
        raise RuntimeError("the capture is invalid")

    def failing() -> None:
        with decisions_beside(DEVICE):
            take(events, 0)
            monkeypatch.setattr(Stream, "wait_stream", broken)
            raise ValueError("of the model")

    with pytest.raises(ValueError, match="of the model") as caught:
        failing()
    assert caught.value.__context__ is None
    assert "layer 0" not in events, "what had not begun is not begun after an error"
    take(events, 1)
    assert events[-1] == "layer 1", "decisions are taken at once again"
