"""A timing pass on a noisy machine is measured once more, and says so; the machine is a virtual one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from kvbench.models.loader import LoadedModel
from kvbench.tasks import speed
from kvbench.tasks import speed as reference_kernel
from kvbench.tasks.speed import Launch, Speed, foreign_gpu_processes, reference_ms
from kvbench.tasks.task import TaskResult
from tests.stats.worlds import VirtualClock
from tests.tasks.benches import bench_of, cut


def timed(
    loaded: LoadedModel,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    clock: Callable[[int], VirtualClock],
    references: list[float],
) -> TaskResult:
    """Run the speed task with launches from a virtual clock; `clock` is asked with the number of the launch."""
    rng, count, order = np.random.default_rng(0), 0, []
    real = speed.launch

    def virtual(*words: object, **more: object) -> Launch:
        nonlocal count
        if more:  # the first warm-up looks into the caches
            return real(*words, **more)  # type: ignore[arg-type]
        count += 1
        order.append(words[2] is bench.setting)
        (step,) = clock(count - 1).launches(rng, np.ones(1))
        return Launch(ttft_ms=5.0, steps_ms=[float(step)] * 3)

    monkeypatch.setattr(speed, "launch", virtual)
    monkeypatch.setattr(speed, "reference_ms", lambda device: references.pop(0))
    bench = bench_of(loaded, folder, cut())
    result = Speed(new_tokens=4, num_blocks=3).run(bench)
    assert order == [True, False, False, True] * (len(order) // 4), "policy, full, full, policy"
    return result


def values(result: TaskResult) -> dict[str, float]:
    return {name: entry["value"] for name, entry in result.measurements.items()}


QUIET = VirtualClock(launch_sd=0.005, spike_share=0.0)
LOUD = VirtualClock(launch_sd=0.3, spike_share=0.0)


def test_a_quiet_machine_is_measured_once(
    bundled: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = timed(bundled, tmp_path, monkeypatch, lambda number: QUIET, [1.0, 1.001])
    found = values(result)
    assert found["timing_passes"] == 1
    assert not result.is_noisy
    assert found["tpot_spread_fraction"] < 0.03
    assert found["reference_drift_fraction"] == pytest.approx(0.001)
    assert found["ttft_spread_fraction"] == 0.0


def test_noise_that_passes_is_measured_again_and_forgotten_whole(
    bundled: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = lambda number: LOUD if number < 12 else QUIET  # noqa: E731
    result = timed(bundled, tmp_path, monkeypatch, clock, [1.0, 1.0, 1.0, 1.0])
    found = values(result)
    assert found["timing_passes"] == 2
    assert found["tpot_spread_fraction"] < 0.03
    assert len(result.curves["launches_ms"]) == 6
    assert found["tpot_ratio_to_full"] == pytest.approx(1.0, abs=0.02)
    assert not result.is_noisy


def test_drift_of_the_reference_is_noise_too_and_stays_in_the_record(
    bundled: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = timed(bundled, tmp_path, monkeypatch, lambda number: QUIET, [1.0, 1.1, 1.0, 0.9])
    found = values(result)
    assert found["timing_passes"] == 2
    assert result.is_noisy
    assert found["reference_drift_fraction"] == pytest.approx(0.1)


def test_the_reference_kernel_takes_time_and_a_cpu_has_no_gpu_processes() -> None:
    assert reference_ms(torch.device("cpu")) > 0
    assert foreign_gpu_processes(torch.device("cpu")) is None


@pytest.mark.parametrize(("output", "foreign"), [("123\n", 0), ("123\n456\n", 1), ("", None), ("[N/A]\n", None)])
def test_other_processes_are_counted_by_the_drivers_tool(
    output: str, foreign: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\nprintf '{output.replace(chr(10), chr(92) + 'n')}'\n", encoding="utf-8")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert reference_kernel._count_foreign("GPU-1") == foreign


def test_without_the_drivers_tool_nothing_is_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert reference_kernel._count_foreign("GPU-1") is None
