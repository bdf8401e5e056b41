from __future__ import annotations

from pathlib import Path

import pytest

from kvbench.cache import Budget
from kvbench.errors import ConfigError
from kvbench.metrics.allocation import parameter_bytes
from kvbench.models.inputs import prompt_batch
from kvbench.models.loader import LoadedModel
from kvbench.runs.loop import CacheSetting
from kvbench.runs.memory import Memory
from kvbench.runs.speed import Launch, Speed
from tests.runs.benches import FULL, SCENES, bench_of, cut

ENTRY_BYTES = 2 * 4 * 2 * 32 * 4  # keys and values, 4 layers, 2 KV heads of width 32, float32
SPEED = {"ttft_ms", "tpot_ms", "tpot_p90_ms", "throughput_tokens_per_s", "ttft_ratio_to_full", "tpot_ratio_to_full"}


def memory(loaded: LoadedModel, folder: Path, setting: CacheSetting, **options: int) -> dict[str, int]:
    result = Memory(**options).run(bench_of(loaded, folder, setting))
    assert all(entry["unit"] == "bytes" for entry in result.measurements.values())
    return {name: entry["value"] for name, entry in result.measurements.items()}


@pytest.mark.parametrize("batch_size", [1, 2])
def test_stored_bytes_are_those_of_the_slots(bundled: LoadedModel, tmp_path: Path, batch_size: int) -> None:
    numbers = memory(bundled, tmp_path, cut(Budget(tokens=32)), new_tokens=5, batch_size=batch_size)
    assert numbers["kv_stored_bytes"] == batch_size * 33 * ENTRY_BYTES, "32 entries and the slot of the next one"
    assert numbers["kv_valid_bytes"] == batch_size * 32 * ENTRY_BYTES
    assert numbers["kv_theoretical_bytes"] == batch_size * 32 * ENTRY_BYTES


def test_a_fifth_of_the_budget_is_a_fifth_of_the_bytes(bundled: LoadedModel, tmp_path: Path) -> None:
    full = memory(bundled, tmp_path, FULL, new_tokens=8)
    fifth = memory(bundled, tmp_path, cut(Budget(fraction=0.2)), new_tokens=8)
    prompt = prompt_batch(bundled, SCENES.examples()[:1]).prompt_tokens[0]
    assert full["kv_stored_bytes"] == (prompt + 8 + 1) * ENTRY_BYTES
    assert full["kv_valid_bytes"] == (prompt + 7) * ENTRY_BYTES
    assert fifth["kv_stored_bytes"] < 0.22 * full["kv_stored_bytes"]
    assert fifth["peak_decode_bytes"] < full["peak_decode_bytes"]


def test_peaks_hold_the_weights_and_what_comes_on_top(bundled: LoadedModel, tmp_path: Path) -> None:
    numbers = memory(bundled, tmp_path, FULL, new_tokens=3)
    assert numbers["peak_load_bytes"] == parameter_bytes(bundled.model)
    assert numbers["peak_prefill_bytes"] > numbers["peak_load_bytes"] + numbers["kv_stored_bytes"]
    assert numbers["peak_decode_bytes"] > numbers["peak_load_bytes"] + numbers["kv_stored_bytes"]
    assert numbers["peak_memory_bytes"] == max(numbers["peak_prefill_bytes"], numbers["peak_decode_bytes"])


def test_speed_gives_every_number_and_the_full_cache_is_as_fast_as_itself(bundled: LoadedModel, tmp_path: Path) -> None:
    task = Speed(new_tokens=12, num_blocks=3)
    # A busy machine can spoil one measurement, not three.
    results = (task.run(bench_of(bundled, tmp_path, FULL)) for _ in range(3))
    good = next((r for r in results if 0.3 < r.measurements["tpot_ratio_to_full"]["value"] < 3), None)
    assert good is not None
    assert set(good.measurements) == SPEED
    assert {entry["n"] for entry in good.measurements.values()} == {6}
    assert all(entry["value"] > 0 for entry in good.measurements.values())
    assert len(good.curves["launches_ms"]) == 6


def test_a_launch_is_summed_up_by_median_and_nearest_rank() -> None:
    launch = Launch(ttft_ms=100.0, steps_ms=[float(step) for step in range(1, 11)])
    assert (launch.tpot_ms, launch.tpot_p90_ms, launch.total_s) == (5.5, 9.0, pytest.approx(0.155))


@pytest.mark.parametrize(
    ("task", "wrong"),
    [
        (Speed, {"new_tokens": 2}),
        (Speed, {"num_blocks": 0}),
        (Speed, {"num_warmups": 0}),
        (Speed, {"batch_size": 0}),
        (Memory, {"new_tokens": 1}),
        (Memory, {"batch_size": 0}),
    ],
)
def test_a_number_out_of_range_is_refused(task: type, wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="allowed"):
        task(**wrong)
