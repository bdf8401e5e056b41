"""Several devices in numbers: roofs that add up, peaks and bytes of each, and what is measured once per device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kvbench.measures import MEASURES
from kvbench.models.loader import LoadedModel
from kvbench.tasks import memory, speed
from kvbench.tasks import memory as capacity
from kvbench.tasks.memory import PhasePeaks, parameter_bytes
from kvbench.tasks.speed import Arm, DeviceMarks, Reads, step_weight_bytes
from kvbench.tasks.task import TaskResult
from tests.tasks.benches import FULL, bench_of, cut

CPU, META = torch.device("cpu"), torch.device("meta")
GPUS = [torch.device("cuda", 0), torch.device("cuda", 1)]


def test_roofs_of_devices_add_up_each_at_its_own_bandwidth() -> None:
    arm = Arm(setting=FULL, valid_bytes=[{CPU: 100, META: 40}, {CPU: 300, META: 60}])
    reads = [
        Reads(device=CPU, weight_bytes=1000, bandwidth=1e3),
        Reads(device=META, weight_bytes=450, bandwidth=2e3),
        Reads(device=GPUS[0], weight_bytes=10, bandwidth=1e4),  # a device with an output head and no layer
    ]
    assert arm.roofs_ms(reads) == [1200.0, 250.0, 1.0]
    arm.launches = [speed.Launch(ttft_ms=1.0, steps_ms=[2902.0])]
    result = TaskResult()
    speed._roof(result, arm, arm, reads)
    found = {name: entry["value"] for name, entry in result.measurements.items()}
    assert found["roof_ms"] == found["full_roof_ms"] == 1451.0
    assert found["roof_share_fraction"] == 0.5
    assert [found[f"device{number}_roof_ms"] for number in range(3)] == [1200.0, 250.0, 1.0]
    assert found["copy_bandwidth_bytes_per_s"] == pytest.approx(1460 / (1000 / 1e3 + 450 / 2e3 + 10 / 1e4))
    assert set(found) <= set(MEASURES)


def test_one_device_gives_the_numbers_that_it_gave() -> None:
    result = TaskResult()
    arm = Arm(setting=FULL, valid_bytes=[{CPU: 100}], launches=[speed.Launch(ttft_ms=1.0, steps_ms=[1.0])])
    speed._roof(result, arm, arm, [Reads(device=CPU, weight_bytes=900, bandwidth=1e6)])
    assert not any(name.startswith("device") for name in result.measurements)
    assert result.measurements["copy_bandwidth_bytes_per_s"]["value"] == 1e6
    assert result.measurements["roof_ms"]["value"] == 1.0


def test_weights_are_counted_where_they_lie(bundled: LoadedModel) -> None:
    model = bundled.model
    assert step_weight_bytes(model, CPU) == step_weight_bytes(model)
    assert step_weight_bytes(model, META) == parameter_bytes(model, META) == 0
    assert parameter_bytes(model, CPU) == parameter_bytes(model)


class Allocator:
    """Two GPUs whose peaks follow a script; resetting takes the next number of one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *peaks: list[int]) -> None:
        self.peaks = dict(zip(GPUS, peaks, strict=True))
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: self.peaks[device][0])
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 2 * self.peaks[device][0])
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: self.peaks[device].pop(0))


def test_peaks_are_of_each_device_and_a_phase_has_what_they_add_up_to(monkeypatch: pytest.MonkeyPatch) -> None:
    #                        before, prefill, settle, prefill again
    Allocator(monkeypatch, [0, 50, 70, 60, 0], [0, 30, 10, 20, 0])
    peaks = PhasePeaks(devices=GPUS, base_bytes=0)
    with peaks.phase("prefill"), peaks.phase("settle"):
        pass
    assert peaks.peak_bytes == {"prefill": 60 + 30, "settle": 70 + 10}
    assert peaks.by_device == {GPUS[0]: {"prefill": 60, "settle": 70}, GPUS[1]: {"prefill": 30, "settle": 10}}
    assert peaks.reserved_bytes == 140 + 60


def test_a_launch_at_capacity_is_watched_on_every_device(monkeypatch: pytest.MonkeyPatch) -> None:
    Allocator(monkeypatch, [5, 80, 90], [5, 40, 30])
    held = capacity.Held(devices=GPUS)
    for _ in range(2):
        with held.watched():
            pass
    result = TaskResult()
    held.note(result)
    found = {name: entry["value"] for name, entry in result.measurements.items()}
    assert found == {"capacity_peak_bytes": 130, "device0_capacity_peak_bytes": 90, "device1_capacity_peak_bytes": 40}


def test_marks_of_devices_add_up() -> None:
    marks = DeviceMarks()
    for device in (CPU, torch.device("cpu", 0), CPU):
        with marks.around(device):
            torch.ones(100).sum()
    assert marks.inside_ms() > 0
    assert DeviceMarks().inside_ms() == 0


@pytest.mark.parametrize(
    "task",
    [pytest.param(speed.Speed(new_tokens=3, num_blocks=1), marks=pytest.mark.long), memory.Memory(new_tokens=3)],
    ids=repr,
)
def test_a_model_over_two_names_of_a_device_gives_every_number_of_both(
    task: Any, bundled: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    wide = replace(bundled, spread_over=(CPU, torch.device("cpu", 0)))
    found = task.run(bench_of(wide, tmp_path, cut())).measurements
    alone = task.run(bench_of(bundled, tmp_path, cut())).measurements
    extra = set(found) - set(alone)
    names = {name.partition("_")[2] for name in extra}
    assert extra == {f"device{number}_{name}" for number in (0, 1) for name in names}
    wanted = {"roof_ms", "full_roof_ms", "copy_bandwidth_bytes_per_s"}
    if isinstance(task, memory.Memory):
        wanted = {"peak_memory_bytes", "peak_load_bytes", "kv_stored_bytes", "kv_valid_bytes"}
        assert found["device0_kv_stored_bytes"]["value"] == alone["kv_stored_bytes"]["value"]
        assert found["device1_kv_stored_bytes"]["value"] == 0, "no layer says that it lies there"
    assert names == wanted
