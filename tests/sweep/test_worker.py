"""The worker's end of the pipe: what it says, how often, and that it waits before it times."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvbench.sweep.process import GO, message_of
from kvbench.sweep.worker import Loading, PipeWatcher, moved_bytes, prepare


class Pipes:
    """A watcher and both ends of its pipes."""

    def __init__(self, beat_every_s: float = 1e9) -> None:
        self.said, self.messages = os.pipe()
        self.answers, self.answer = os.pipe()
        os.set_blocking(self.said, False)
        os.set_blocking(self.answers, False)
        self.watcher = PipeWatcher(self.messages, answers=self.answers, beat_every_s=beat_every_s)

    def lines(self) -> list[bytes]:
        return os.read(self.said, 2**16).splitlines()

    def events(self) -> list[str]:
        return [message["event"] for line in self.lines() if (message := message_of(line)) is not None]

    def close(self) -> None:
        self.watcher.bye()
        for descriptor in (self.said, self.messages, self.answers, self.answer):
            os.close(descriptor)


@pytest.fixture
def pipes() -> Iterator[Pipes]:
    pipes = Pipes()
    yield pipes
    pipes.close()


def test_every_event_is_understood_again(pipes: Pipes) -> None:
    pipes.watcher.hello({"torch": "2"})
    pipes.watcher.active("k", "load")
    pipes.watcher.advance("k", 1)
    pipes.watcher.done({"key": "k", "error": None})
    pipes.watcher.bye()
    lines = [line for line in pipes.lines() if line]
    messages: list[Any] = [message_of(line) for line in lines]
    assert messages == [json.loads(line) for line in lines]
    assert [message["event"] for message in messages] == ["hello", "active", "advance", "done", "bye"]


def test_a_line_that_somebody_else_began_spoils_no_message(pipes: Pipes) -> None:
    os.write(pipes.messages, b'{"event": "no end')
    pipes.watcher.advance("k", 0.5)
    assert pipes.events() == ["advance"]


def test_a_timed_phase_begins_when_the_parent_has_answered(pipes: Pipes) -> None:
    os.write(pipes.answer, GO)
    pipes.watcher.active("k", "perplexity")
    assert os.read(pipes.answers, 1) == GO, "what is not timed asks for nothing"
    os.write(pipes.answer, GO)
    pipes.watcher.active("k", "speed", timed=True)
    with pytest.raises(BlockingIOError):
        os.read(pipes.answers, 1)
    assert [message_of(line)["timed"] for line in pipes.lines() if line] == [False, True]  # type: ignore[index]


def test_beats_are_told_no_more_often_than_they_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    pipes, now_s = Pipes(beat_every_s=45.0), time.monotonic() + 1e6
    with monkeypatch.context() as patch:
        for step in range(1000):
            patch.setattr(time, "monotonic", lambda step=step: now_s + 0.1 * step)
            pipes.watcher.beat()
    assert pipes.events() == ["beat"] * 3, "at 0, 45 and 90 of 100 seconds"
    pipes.close()


def test_loading_beats_while_it_uses_the_processor_and_not_while_it_waits_for_ever() -> None:
    used_s = iter([1.0, 2.0, 2.0, 2.01, 4.0])
    beats: list[int] = []
    loading = Loading(lambda: beats.append(1), every_s=10.0, cpu_s=lambda: next(used_s), moved=lambda: 0)
    counts = []
    for _ in range(4):
        loading.look()
        counts.append(len(beats))
    assert counts == [1, 1, 1, 2], "a hundredth of a core is nothing"


def test_loading_beats_while_bytes_come_from_a_slow_disk_or_network() -> None:
    """At 1 MB/s a large checkpoint takes hours, and a thousandth of a core."""
    moved = iter([0, 10**7, 10**7 + 1_000, 2 * 10**7])
    beats: list[int] = []
    loading = Loading(lambda: beats.append(1), every_s=10.0, cpu_s=lambda: 0.0, moved=lambda: next(moved))
    counts = []
    for _ in range(3):
        loading.look()
        counts.append(len(beats))
    assert counts == [1, 1, 2], "what the beats themselves write is nothing"


def test_what_a_process_reads_is_counted(tmp_path: Path) -> None:
    if not Path("/proc/self/io").exists():
        pytest.skip("only Linux counts it")
    (tmp_path / "file").write_bytes(b"x" * 3_000_000)
    before = moved_bytes()
    (tmp_path / "file").read_bytes()
    assert moved_bytes() - before >= 3_000_000


def test_nothing_runs_beside_a_phase_after_loading(pipes: Pipes) -> None:
    loading = pipes.watcher._loading
    pipes.watcher.active("k", "load")
    assert loading.is_alive()
    pipes.watcher.active("k", "speed")
    assert not loading.is_alive()


def test_a_worker_is_tied_to_its_parent_before_anything_heavy_is_imported() -> None:
    code = "import sys, kvbench.sweep.worker; print({'torch', 'hydra', 'omegaconf'} & set(sys.modules))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout == "set()\n"


def test_what_scores_text_is_imported_early_only_while_no_job_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    scored: list[dict[str, str]] = []
    monkeypatch.setattr("kvbench.tasks.rouge.rouge_scores", lambda **texts: scored.append(texts))
    prepare(is_awaited=lambda: True)
    assert scored == []
    prepare(is_awaited=lambda: False)
    (texts,) = scored
    assert len(set(texts.values())) == 2, "the scorer is not asked about one text twice"
