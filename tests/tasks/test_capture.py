"""What surrounds a capture, without a GPU: a wait for the device is told, and a failed capture leaves nothing."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch

from kvbench.cache import decisions
from kvbench.cache.decisions import decide
from kvbench.errors import PolicyError
from kvbench.tasks import decode as capture
from kvbench.tasks import speed
from kvbench.tasks.decode import captured, warm_up

DEVICE = torch.device("cuda", 3)


class FakeStream:
    device_index = 3

    def wait_stream(self, other: Any) -> None:
        pass


class FakeCuda:
    """Stands for torch.cuda: `calls` in order, the current stream, and the debug mode."""

    def __init__(self, ending: BaseException | None) -> None:
        self.calls: list[Any] = []
        self.mode: Any = 0
        self.ending = ending
        self.main = FakeStream()
        self.current = self.main
        self.pools: list[Any] = []

    def note(self, *call: Any) -> None:
        self.calls.append(call)

    def set_mode(self, mode: Any) -> None:
        if mode == "error":
            warnings.warn("a prototype that does not detect everything", UserWarning, stacklevel=2)
        self.mode = mode

    def set_stream(self, stream: FakeStream) -> None:
        self.current = stream

    @contextlib.contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def graph(self, graph: Any, *, pool: Any, stream: FakeStream) -> Iterator[None]:
        self.current = stream
        self.pools.append(pool)
        try:
            yield
        finally:
            if self.ending is not None:
                raise self.ending
            self.current = self.main


@pytest.fixture
def cuda(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda(getattr(request, "param", None))
    capture._side_stream.cache_clear()
    decisions._stream.cache_clear()
    patches: dict[str, Any] = {
        "Stream": lambda device: FakeStream(),
        "current_stream": lambda device: fake.current,
        "set_stream": fake.set_stream,
        "stream": fake.stream,
        "graph": fake.graph,
        "CUDAGraph": lambda: FakeGraph(),
        "graph_pool_handle": lambda: (0, 7),
        "get_sync_debug_mode": lambda: fake.mode,
        "set_sync_debug_mode": fake.set_mode,
        "synchronize": lambda device: fake.calls.append("synchronize"),
    }
    for name, patch in patches.items():
        monkeypatch.setattr(torch.cuda, name, patch)
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(torch._C, name, partial(fake.note, name), raising=False)
    return fake


class FakeGraph:
    def replay(self) -> None:
        pass


class Step:
    """Work that waits for the device at some of its runs."""

    def __init__(self, cuda: FakeCuda, waits_at: Callable[[int], bool]) -> None:
        self.cuda, self.waits_at = cuda, waits_at
        self.runs: list[FakeStream] = []

    def __call__(self) -> None:
        self.runs.append(self.cuda.current)
        if self.waits_at(len(self.runs)) and self.cuda.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")


@pytest.mark.filterwarnings("error")
def test_what_waits_only_the_first_time_is_let_through(cuda: FakeCuda) -> None:
    step, undone = Step(cuda, lambda run: run == 1), []
    warm_up(step, DEVICE, undo=lambda: undone.append(cuda.current))
    assert len(step.runs) == 2
    assert undone == [cuda.main, cuda.main]
    assert step.runs[0] is step.runs[1] is not cuda.main
    assert cuda.mode == 0


def test_what_waits_at_every_step_is_a_policy_error_with_the_way_out(cuda: FakeCuda) -> None:
    with pytest.raises(PolicyError, match=r"waits for the device .*in __call__.*engine=eager") as caught:
        warm_up(Step(cuda, lambda run: True), DEVICE)
    assert "\n" not in str(caught.value)
    assert cuda.mode == 0
    assert cuda.current is cuda.main


def test_another_error_of_a_step_stays_what_it_is(cuda: FakeCuda) -> None:
    def broken() -> None:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        warm_up(broken, DEVICE)
    assert cuda.mode == 0


def test_one_side_stream_serves_warm_up_and_every_capture(cuda: FakeCuda) -> None:
    step = Step(cuda, lambda run: False)
    for _ in range(2):
        warm_up(step, DEVICE)
        captured(step, DEVICE)
    assert len(step.runs) == 6
    assert len(set(step.runs)) == 1
    assert cuda.calls == []
    assert cuda.current is cuda.main


@pytest.mark.parametrize("cuda", [RuntimeError("operation failed due to a previous error")], indirect=True)
def test_a_capture_that_fails_gives_back_its_stream_and_its_memory(cuda: FakeCuda) -> None:
    with pytest.raises(RuntimeError, match="previous error"):
        captured(lambda: None, DEVICE)
    assert cuda.current is cuda.main
    assert cuda.pools == [(0, 7)]
    assert cuda.calls == [("_cuda_endAllocateToPool", 3, (0, 7)), ("_cuda_releasePool", 3, (0, 7))]


@pytest.mark.parametrize("cuda", [RuntimeError("operation failed due to a previous error")], indirect=True)
@pytest.mark.parametrize("text", ["CUDA out of memory", "Triton Error [CUDA]: out of memory"])
def test_memory_that_ran_out_in_a_capture_is_told_as_that(cuda: FakeCuda, text: str) -> None:
    def asks_for_too_much() -> None:
        raise torch.OutOfMemoryError(text) if text.startswith("CUDA") else RuntimeError(text)

    with pytest.raises(RuntimeError, match="out of memory"):
        captured(asks_for_too_much, DEVICE)
    assert cuda.current is cuda.main


@pytest.mark.parametrize(("waits", "how"), [(True, "launched kernel by kernel"), (False, "CUDA graph")])
def test_deciding_that_waits_is_run_as_it_is(cuda: FakeCuda, waits: bool, how: str) -> None:
    class Cache:
        decide = Step(cuda, lambda run: waits)

    work, told = speed._captured(Cache.decide, DEVICE)
    assert told == how
    assert (work is Cache.decide) == waits
    work()


def test_deciding_that_runs_out_of_memory_is_not_hidden(cuda: FakeCuda) -> None:
    class Cache:
        @staticmethod
        def decide() -> None:
            raise RuntimeError("CUDA error: out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        speed._captured(Cache.decide, DEVICE)


@pytest.mark.parametrize("layers", [1, 3, 4, 6])
def test_a_decision_of_any_layer_that_waits_is_found_before_the_capture(cuda: FakeCuda, layers: int) -> None:
    """Decisions of the last layers branch off when the step is at its end."""

    def decision(layer: int) -> None:
        if layer == layers - 1 and cuda.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    def work() -> None:
        for layer in range(layers):
            decide(partial(decision, layer))

    with pytest.raises(PolicyError, match="waits for the device"):
        warm_up(work, DEVICE)
    assert cuda.mode == 0


def test_a_decision_that_has_not_begun_hides_no_error_of_the_model(cuda: FakeCuda) -> None:
    def wrong() -> None:
        raise PolicyError("the score of layer 0")

    def work() -> None:
        decide(wrong)
        raise torch.OutOfMemoryError("CUDA out of memory in layer 1")

    with pytest.raises(torch.OutOfMemoryError):
        warm_up(work, DEVICE)
    with pytest.raises(torch.OutOfMemoryError):
        captured(work, DEVICE)
