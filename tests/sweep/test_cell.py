from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch

from kvbench.datasets.base import Example
from kvbench.datasets.scenes import Scenes
from kvbench.errors import ConfigError, DataError, ModelSupportError, NonFiniteError, PolicyError
from kvbench.models.spec import ModelSpec
from kvbench.stats.intervals import mean_interval
from kvbench.sweep import cell as environment
from kvbench.sweep.cell import Cell, resolve_devices, resolve_engine
from kvbench.sweep.group import ModelShelf
from kvbench.tasks.task import Bench, TaskResult
from tests.sweep.watching import run_cells
from tests.tasks.benches import SCENES, cell_of


@dataclass(frozen=True)
class Counts:
    """A task that measures how many examples there are."""

    is_noisy: bool = False

    def run(self, bench: Bench) -> TaskResult:
        result = TaskResult(is_noisy=self.is_noisy)
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
    return run_cells([cell], folder, shelf=shelf).bodies[cell.key]


def test_a_good_cell_has_measurements_samples_and_no_error(shelf: ModelShelf, tmp_path: Path) -> None:
    body = body_of(cell_of({"counts": Counts()}), shelf, tmp_path)
    assert (body["status"], body["phase"], body["error"]) == ("ok", None, None)
    assert body["measurements"]["ppl"]["value"] == 3.0  # type: ignore[index]
    names = [example.id for example in SCENES.examples()]
    assert body["samples"] == [{"id": name, "cluster": name, "nll_sum": 1.0} for name in names]
    assert body["environment"]["torch"] == torch.__version__  # type: ignore[index]


def test_times_of_a_restless_machine_make_a_cell_noisy_and_a_failure_comes_first(
    shelf: ModelShelf, tmp_path: Path
) -> None:
    restless = Counts(is_noisy=True)
    body = body_of(cell_of({"counts": restless, "more": Counts()}), shelf, tmp_path)
    assert (body["status"], body["phase"], body["error"]) == ("noisy", None, None)
    failed = body_of(cell_of({"counts": restless, "raises": Raises(ValueError())}), shelf, tmp_path)
    assert (failed["status"], failed["phase"]) == ("crash", "raises")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("tried to allocate 2 GiB"), "oom"),
        (MemoryError("no memory"), "oom"),
        (RuntimeError("CUDA error: out of memory"), "oom"),
        (RuntimeError("Triton Error [CUDA]: out of memory"), "oom"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "oom"),
        (ValueError("CUDA error: out of memory"), "crash"),
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


def test_code_that_runs_without_being_installed_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    real = environment.version

    def version(name: str) -> str:
        if name == "kvbench":
            raise PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(environment, "version", version)
    environment.environment.cache_clear()
    told = environment.environment("cpu")
    environment.environment.cache_clear()
    assert told["kvbench"] is None
    assert told["torch"] == torch.__version__


def test_a_list_of_devices_is_resolved_to_the_gpus_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    plain = ModelSpec(checkpoint="bundled")
    for asked, numbers, first in (("auto", (0, 1, 2), "cuda:0"), ((2, 1), (1, 2), "cuda:1"), ((1,), None, "cuda:1")):
        found, device = resolve_devices(replace(plain, devices=asked), "auto")  # type: ignore[arg-type]
        assert (found.devices, device) == (numbers, first)
    wide, _ = resolve_devices(replace(plain, devices=(0, 1)), "cuda")
    assert wide.key() == replace(plain, devices=(0, 2)).key() != plain.key()
    assert replace(plain, devices=None).key() == plain.key()
    for asked in ("cpu", "cuda:1"):
        with pytest.raises(ConfigError, match=rf"device is '{asked}', but model\.devices says .*use device=auto"):
            resolve_devices(wide, asked)


def test_a_model_over_several_gpus_is_never_captured() -> None:
    assert [resolve_engine(asked, "cuda:0", is_spread=True) for asked in ("auto", "eager")] == ["eager", "eager"]
    with pytest.raises(ConfigError, match=r"engine is 'graph', which captures a step on one GPU.*use engine=eager"):
        resolve_engine("graph", "cuda:0", is_spread=True)
    with pytest.raises(ConfigError, match="did you mean 'graph'"):
        resolve_engine("graf", "cuda:0", is_spread=True)
