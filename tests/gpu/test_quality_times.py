"""The timing of quality passes runs from end to end on a tiny model, so that a GPU's time is not lost on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gpu import quality_times
from tests.gpu.quality_times import POLICIES, measured
from tests.models.checkpoints import save_checkpoint

SHORT = ("dataset=frankenstein", "dataset.prompt_tokens=20", "dataset.scored_tokens=5", "dataset.num_samples=2")


def test_a_sweep_of_other_code_than_is_imported_is_no_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other" / "kvbench"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(other.parent))
    ((_, error),) = measured(["cells"], tmp_path / "out", 9.0)
    assert "a sweep would run" in error
    assert str(other) in error


@pytest.mark.long
def test_every_part_is_measured_and_one_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_checkpoint("llama", tmp_path)
    monkeypatch.setattr(quality_times, "WORDS", ("model=local", f"model.checkpoint={folder}", *SHORT))
    monkeypatch.setattr(quality_times, "STEPS", 2)
    found = dict(measured(["start", "steps", "cells"], tmp_path, 300.0))
    assert found["start"]["start_s"] > 0
    assert set(found["steps"]) == {f"{dtype} {policy}" for dtype in ("float32", "bfloat16") for policy in POLICIES}
    assert found["cells"]["ended"] == "done"
    assert len(found["cells"]) == 2 + len(POLICIES)
    monkeypatch.setattr(quality_times, "WORDS", ("model=nothing",))
    ((_, error),) = measured(["start"], tmp_path, 300.0)
    assert "nothing" in error
