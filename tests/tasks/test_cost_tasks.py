from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kvbench.cache import Budget
from kvbench.datasets.text import Synthetic
from kvbench.errors import ConfigError
from kvbench.measures import MEASURES
from kvbench.models.inputs import prompt_batch
from kvbench.models.loader import LoadedModel, load_model
from kvbench.tasks.decode import CacheSetting
from kvbench.tasks.memory import Memory, parameter_bytes
from kvbench.tasks.speed import Launch, Speed, step_weight_bytes
from tests.models.architectures import SMALL, small_spec
from tests.tasks.benches import FULL, SCENES, bench_of, cut

NUM_LAYERS = 3
ENTRY_BYTES = 2 * NUM_LAYERS * 2 * 32 * 4  # keys and values, 2 KV heads of width 32, float32
PER_LAUNCH = {
    *("ttft_ms", "tpot_ms", "tpot_p90_ms", "settle_ms", "prepare_ms", "full_ttft_ms", "full_tpot_ms"),
    *("throughput_tokens_per_s", "ttft_ratio_to_full", "tpot_ratio_to_full", "throughput_ratio_to_full"),
    *("roof_share_fraction", "full_roof_share_fraction"),
}
ONCE = {"roof_ms", "full_roof_ms", "copy_bandwidth_bytes_per_s", "policy_ms"} | {
    *("tpot_spread_fraction", "ttft_spread_fraction", "reference_drift_fraction", "timing_passes")
}


def memory(loaded: LoadedModel, folder: Path, setting: CacheSetting, **options: int) -> dict[str, int]:
    result = Memory(**options).run(bench_of(loaded, folder, setting))
    units = {"peak_over_bound_ratio": ""}
    assert all(entry["unit"] == units.get(name, "bytes") for name, entry in result.measurements.items())
    assert set(result.measurements) <= set(MEASURES)
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
    assert fifth["bookkeeping_bytes"] < 0.22 * full["bookkeeping_bytes"]
    assert full["statistics_bytes"] == 0, "the full cache asks for none"


def test_peaks_hold_the_weights_and_what_comes_on_top(bundled: LoadedModel, tmp_path: Path) -> None:
    numbers = memory(bundled, tmp_path, FULL, new_tokens=3)
    assert numbers["peak_load_bytes"] == parameter_bytes(bundled.model)
    assert numbers["peak_prefill_bytes"] > numbers["peak_load_bytes"] + numbers["kv_stored_bytes"]
    assert numbers["peak_decode_bytes"] > numbers["peak_load_bytes"] + numbers["kv_stored_bytes"]
    phases = ("vision", "prefill", "settle", "decode")
    assert numbers["peak_memory_bytes"] == max(numbers[f"peak_{name}_bytes"] for name in phases)


def test_every_phase_has_its_own_peak(bundled: LoadedModel, tmp_path: Path) -> None:
    numbers = memory(bundled, tmp_path, cut(Budget(fraction=0.1)), new_tokens=3)
    weights = numbers["peak_load_bytes"]
    assert weights < numbers["peak_vision_bytes"] < numbers["peak_memory_bytes"], "the decoder has not started"
    assert numbers["peak_settle_bytes"] > weights + numbers["kv_stored_bytes"], "at the last layer all is stored"
    assert numbers["peak_decode_bytes"] < numbers["peak_prefill_bytes"], "one token needs less than a prompt"


def test_the_bound_is_made_of_its_parts(bundled: LoadedModel, tmp_path: Path) -> None:
    numbers = memory(bundled, tmp_path, cut(Budget(fraction=0.2)), new_tokens=4, batch_size=2)
    batch = prompt_batch(bundled, SCENES.examples()[:2])
    inputs = sum(tensor.untyped_storage().nbytes() for tensor in batch.tensors.values())
    bound = numbers["peak_load_bytes"] + inputs + numbers["plain_activation_bytes"] + numbers["kv_theoretical_bytes"]
    bound += batch.kind.numel() * ENTRY_BYTES // NUM_LAYERS
    assert numbers["peak_over_bound_ratio"] == pytest.approx(numbers["peak_memory_bytes"] / bound)
    assert 0 < numbers["plain_activation_bytes"] < numbers["peak_memory_bytes"]


def test_the_phases_of_a_text_model_leave_vision_out(tmp_path: Path) -> None:
    loaded = load_model(small_spec("llama-3.1-8b"), "cpu")
    bench = replace(bench_of(loaded, tmp_path, FULL), examples=Synthetic(prompt_tokens=20).examples())
    found = Memory(new_tokens=2).run(bench).measurements
    assert "peak_vision_bytes" not in found
    assert {"peak_prefill_bytes", "peak_settle_bytes", "peak_decode_bytes"} <= set(found)


@pytest.mark.cover("one")
@pytest.mark.parametrize("name", SMALL)
def test_speed_and_memory_run_on_random_weights(name: str, tmp_path: Path) -> None:
    loaded = load_model(small_spec(name, dtype="bfloat16"), "cpu")
    bench = replace(bench_of(loaded, tmp_path, cut()), examples=Synthetic(prompt_tokens=24).examples())
    speed = Speed(new_tokens=3, num_blocks=1, batch_size=3).run(bench).measurements
    held = Memory(new_tokens=3, batch_size=3).run(bench).measurements
    assert speed["tpot_ms"]["value"] > 0
    assert held["kv_theoretical_bytes"]["value"] > 0
    assert ("peak_vision_bytes" in held) == loaded.takes_images
    text = loaded.model.config.get_text_config()
    entry_bytes = 2 * 2 * text.num_key_value_heads * (text.hidden_size // text.num_attention_heads) * 2
    assert held["kv_valid_bytes"]["value"] == 3 * 5 * entry_bytes, "20 % of 25 tokens, two layers, bfloat16"


def test_speed_gives_every_number_and_the_full_cache_is_as_fast_as_itself(bundled: LoadedModel, tmp_path: Path) -> None:
    task = Speed(new_tokens=6, num_blocks=2)
    # A busy machine can spoil one measurement, not three.
    results = (task.run(bench_of(bundled, tmp_path, FULL)) for _ in range(3))
    good = next((r for r in results if 0.3 < r.measurements["tpot_ratio_to_full"]["value"] < 3), None)
    assert good is not None
    assert set(good.measurements) == PER_LAUNCH | ONCE
    assert set(good.measurements) <= set(MEASURES)
    assert {good.measurements[name]["n"] for name in PER_LAUNCH} == {4}
    assert good.measurements["policy_ms"]["value"] == 0.0, "the full cache decides nothing"
    positive = set(good.measurements) - {"policy_ms", "prepare_ms"}
    assert all(good.measurements[name]["value"] > 0 for name in positive)
    assert len(good.curves["launches_ms"]) == 4


def test_the_roof_is_weights_and_entries_over_the_bandwidth(bundled: LoadedModel, tmp_path: Path) -> None:
    found = Speed(new_tokens=4, num_blocks=1, batch_size=2).run(bench_of(bundled, tmp_path, cut())).measurements
    bandwidth = found["copy_bandwidth_bytes_per_s"]["value"]
    prompts = prompt_batch(bundled, SCENES.examples()[:2]).prompt_tokens
    for prefix, share in (("", 0.2), ("full_", 1.0)):
        ends = [sum(int(round(share * (length + more), 9)) for length in prompts) for more in (0, 3)]
        expected = step_weight_bytes(bundled.model) + sum(ends) / 2 * ENTRY_BYTES
        assert found[f"{prefix}roof_ms"]["value"] * bandwidth / 1e3 == pytest.approx(expected)
    launches = found["roof_ms"]["value"] / found["roof_share_fraction"]["value"]
    assert launches == pytest.approx(found["tpot_ms"]["value"], rel=0.5), "two launches: median of ratios"


def test_deciding_and_settling_are_timed_for_a_policy_that_cuts(bundled: LoadedModel, tmp_path: Path) -> None:
    found = Speed(new_tokens=6, num_blocks=1).run(bench_of(bundled, tmp_path, cut())).measurements
    assert found["policy_ms"]["value"] > 0
    assert 0 < found["settle_ms"]["value"] < found["ttft_ms"]["value"]


@pytest.mark.long
def test_a_batch_larger_than_the_data_set_repeats_it(bundled: LoadedModel, tmp_path: Path) -> None:
    numbers = memory(bundled, tmp_path, cut(Budget(tokens=8)), new_tokens=2, batch_size=5)
    assert numbers["kv_valid_bytes"] == 5 * 8 * ENTRY_BYTES, "three scenes, five prompts"


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
    with pytest.raises(ConfigError, match="it must be at least"):
        task(**wrong)
