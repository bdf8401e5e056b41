"""Every task that can be configured tells the watchdog of each pass of the model."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import get_class
from omegaconf import OmegaConf

from kvbench.models.inputs import prompt_batch
from kvbench.models.loader import LoadedModel
from kvbench.tasks import decode as graph
from kvbench.tasks import speed
from kvbench.tasks.decode import CacheSetting, Decoding, GraphDecoding
from kvbench.tasks.task import Task, is_timed
from tests.covering import one_in
from tests.tasks.benches import SCENES, bench_of, cut

YAMLS = sorted((Path(__file__).parents[2] / "conf" / "task").glob("*.yaml"))
TASKS = {path.stem: OmegaConf.load(path)._target_ for path in YAMLS if "_target_" in OmegaConf.load(path)}
SMALL = {"max_new_tokens": 4, "new_tokens": 4, "check_tokens": 2, "num_blocks": 1, "num_launches": 1}
SMALL |= {"max_batch_size": 2, "max_turns": 2}
EXAMPLES = SCENES.examples()[:1]  # of two turns and more


def small(target: str) -> Task:
    kind: Any = get_class(target)
    task: Task = kind(**{field.name: SMALL[field.name] for field in fields(kind) if field.name in SMALL})
    return task


class Counting:
    """Counts passes of a model since the last beat."""

    def __init__(self, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
        self.since = self.most = self.num_beats = 0
        forward = loaded.model.forward

        def counted(*arguments: Any, **options: Any) -> Any:
            self.since += 1
            self.most = max(self.most, self.since)
            return forward(*arguments, **options)

        monkeypatch.setattr(loaded.model, "forward", counted)
        self.loaded = replace(loaded, beat=self.beat)

    def beat(self) -> None:
        self.num_beats += 1
        self.since = 0


@pytest.fixture
def counting(bundled: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> Counting:
    """The bundled model, its passes counted."""
    return Counting(bundled, monkeypatch)


@pytest.mark.parametrize("name", one_in(3, TASKS))
def test_no_two_passes_of_the_model_are_without_a_beat(
    name: str, counting: Counting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = replace(bench_of(counting.loaded, tmp_path, cut()), examples=EXAMPLES)
    monkeypatch.setattr(speed, "reference_ms", lambda device: 1.0)
    monkeypatch.setattr(speed, "copy_bandwidth", lambda device: 1e9)
    task: Any = small(TASKS[name])
    task.run(bench)
    assert counting.num_beats > 4
    assert (counting.most, counting.since) == (1, 0)


def test_an_engine_that_replays_beats_at_every_step_and_around_what_it_prepares(
    counting: Counting, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Replayed:
        def replay(self) -> None:
            counting.since += 1
            counting.most = max(counting.most, counting.since)

    def warm_up(work: Any, device: torch.device, *, undo: Any) -> None:
        for _ in range(2):
            work()
            undo()

    def captured(work: Any, device: torch.device) -> Replayed:
        work()
        return Replayed()

    monkeypatch.setattr(graph, "warm_up", warm_up)
    monkeypatch.setattr(graph, "captured", captured)
    setting: CacheSetting = replace(cut(), engine="graph")
    with torch.inference_mode():
        decoding: Decoding = setting.decoding(counting.loaded, prompt_batch(counting.loaded, EXAMPLES), 3)
        assert isinstance(decoding, GraphDecoding)
        for _ in range(3):
            decoding.step(decoding.logits.argmax(dim=-1))
    assert (counting.most, counting.since) == (1, 0)
    assert counting.num_beats == 1 + 4 + 3, "the prompt; warm-ups, between and after the capture; the steps"


def test_what_a_task_needs_beside_it_is_said_by_its_class() -> None:
    timed = {name for name, target in TASKS.items() if is_timed(small(target))}
    assert timed == {"speed", "memory", "capacity"}
    assert is_timed(object()), "a task of somebody else is taken for timed"
