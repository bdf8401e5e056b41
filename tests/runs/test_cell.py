from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from kvbench.datasets.base import Example
from kvbench.datasets.scene_examples import Scenes
from kvbench.errors import ConfigError, DataError, ModelSupportError, NonFiniteError, PolicyError
from kvbench.metrics.intervals import mean_interval
from kvbench.models.spec import ModelSpec
from kvbench.records import check_body, encode_record
from kvbench.runs.cell import Cell, ModelShelf, run_cell
from kvbench.runs.sweep import Sweep
from kvbench.runs.task import Bench, TaskResult
from kvbench.sinks.base import SinkGroup
from kvbench.sinks.store import RecordStore
from tests.runs.benches import SCENES, cell_of


@dataclass(frozen=True)
class Counts:
    """A task that measures how many examples there are."""

    def run(self, bench: Bench) -> TaskResult:
        result = TaskResult()
        result.measure("ppl", mean_interval([float(len(bench.examples))]))
        result.samples = {example.id: {"nll_sum": 1.0} for example in bench.examples}
        bench.advance(1.0)
        return result


@dataclass(frozen=True)
class Raises:
    error: Exception

    def run(self, bench: Bench) -> TaskResult:
        raise self.error


@dataclass(frozen=True)
class AsksForTooMuch:
    def run(self, bench: Bench) -> TaskResult:
        torch.empty(2**60, dtype=torch.uint8)
        return TaskResult()


class BrokenPictures(Scenes):
    def examples(self) -> Sequence[Example]:
        raise DataError("item 3 is broken")


def body_of(cell: Cell, shelf: ModelShelf, folder: Path) -> dict[str, object]:
    body = run_cell(cell, shelf=shelf, results=folder, sweep="s", advance=lambda share: None)
    check_body(body)
    encode_record(body)
    return body


def test_a_good_cell_has_measurements_samples_and_no_error(shelf: ModelShelf, tmp_path: Path) -> None:
    body = body_of(cell_of({"counts": Counts()}), shelf, tmp_path)
    assert (body["status"], body["phase"], body["error"]) == ("ok", None, None)
    assert body["measurements"]["ppl"]["value"] == 3.0  # type: ignore[index]
    names = [example.id for example in SCENES.examples()]
    assert body["samples"] == [{"id": name, "cluster": name, "nll_sum": 1.0} for name in names]
    assert body["environment"]["torch"] == torch.__version__  # type: ignore[index]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("tried to allocate 2 GiB"), "oom"),
        (MemoryError("no memory"), "oom"),
        (NonFiniteError("NaN"), "nonfinite"),
        (DataError("item 3"), "data_error"),
        (ConfigError("wrong"), "config_error"),
        (ModelSupportError("sliding"), "incompatible"),
        (PolicyError("shape"), "crash"),
        (RuntimeError("anything"), "crash"),
        (ValueError("half a pair \ud800"), "crash"),
    ],
)
def test_an_error_becomes_a_status(shelf: ModelShelf, tmp_path: Path, error: Exception, status: str) -> None:
    body = body_of(cell_of({"counts": Counts(), "raises": Raises(error), "never": Counts()}), shelf, tmp_path)
    told = json.loads(json.dumps(body["error"]))
    assert (body["status"], body["phase"]) == (status, "raises")
    assert told["type"] == type(error).__name__
    assert told["message"] == str(error).replace("\ud800", "?")
    assert "in run" in told["traceback"]
    assert "ppl" in body["measurements"], "what was measured before is kept"  # type: ignore[operator]


def test_asking_a_cpu_for_too_much_memory_is_out_of_memory(shelf: ModelShelf, tmp_path: Path) -> None:
    assert body_of(cell_of({"much": AsksForTooMuch()}), shelf, tmp_path)["status"] == "oom"


def test_a_model_that_is_not_supported_fails_in_load(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    cell = cell_of({"counts": Counts()}, model=ModelSpec(checkpoint=str(tmp_path)))
    body = body_of(cell, ModelShelf(), tmp_path)
    assert (body["status"], body["phase"]) == ("incompatible", "load")


def test_a_data_set_that_fails_late_is_a_data_error(shelf: ModelShelf, tmp_path: Path) -> None:
    body = body_of(cell_of({"counts": Counts()}, dataset=BrokenPictures()), shelf, tmp_path)
    assert (body["status"], body["phase"], body["samples"]) == ("data_error", "load", [])


def test_the_shelf_keeps_the_model_it_was_asked_for_last() -> None:
    shelf, spec = ModelShelf(), ModelSpec(checkpoint="bundled")
    first = shelf.get(spec, "cpu")
    assert shelf.get(ModelSpec(checkpoint="bundled"), "cpu") is first
    assert shelf.get(ModelSpec(checkpoint="bundled", dtype="bfloat16"), "cpu") is not first
    assert shelf.get(spec, "cpu") is not first


def sweep_over(cells: Sequence[Cell], folder: Path, *, force: bool = False) -> Sweep:
    by_key = {cell.key: cell for cell in cells}
    sweep = Sweep(name="s", results=folder, cells=by_key, sinks=SinkGroup([]), force=force)
    sweep.open()
    for key in [*by_key, *by_key]:
        sweep.run(key)
    sweep.close()
    return sweep


def test_a_failing_cell_does_not_stop_a_sweep_and_good_ones_are_reused(tmp_path: Path) -> None:
    cells = [
        cell_of({"counts": Counts()}, number=1),
        cell_of({"raises": Raises(ValueError("no"))}, number=2),
        cell_of({"counts": Counts()}, number=3),
    ]
    first = sweep_over(cells, tmp_path)
    assert list(first.statuses.values()) == ["ok", "crash", "ok"]
    assert (first.num_failed, first.num_reused) == (1, 0)
    second = sweep_over(cells, tmp_path)
    assert list(second.statuses.values()) == ["ok", "crash", "ok"]
    assert (second.num_failed, second.num_reused) == (1, 2)
    store = RecordStore(tmp_path)
    (before,) = store.attempts(cells[0].key)
    forced = sweep_over(cells, tmp_path, force=True)
    assert forced.num_reused == 0
    assert [len(store.attempts(cell.key)) for cell in cells] == [2, 3, 2]
    accepted = store.accepted(cells[0].key)
    assert accepted is not None
    assert accepted["attempt"] != before["attempt"], "the newer one counts"
